"""The command line. Verbs only: what they do lives elsewhere and is imported when a verb runs."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eyespot.registry import EXPORTS, IMPORTS

EPILOG = """examples:
  eyespot train recipe=quickstart
  eyespot train recipe=smoke trainer.batch_size=4 name=first
  eyespot plan recipe=gemma270m_llava --devices A100-80 H100
  eyespot ask runs/quickstart/model photo.png "what color is the shape?"
  eyespot caption runs/quickstart/model photos --out captions.jsonl
  eyespot evaluate runs/quickstart/model
  eyespot compare runs/quickstart/before runs/quickstart
  eyespot inspect data recipe=quickstart
  eyespot data report recipe=quickstart data.limit=2000
  eyespot cache show
  eyespot serve runs/quickstart/model
  eyespot export runs/quickstart/model onnx --out quickstart-onnx
"""


def parser() -> argparse.ArgumentParser:
    """The arguments of every verb."""
    top = argparse.ArgumentParser(
        prog="eyespot", description="Build, train, evaluate and ask small vision-language models.", epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    top.add_argument("--version", action="store_true", help="print the version")
    verbs = top.add_subparsers(dest="verb", metavar="VERB")

    train = verbs.add_parser("train", help="train a recipe; the same command resumes an interrupted run")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="recipe=NAME and any setting")
    train.add_argument("--fresh", action="store_true", help="delete what an earlier run of this name left")

    sweep = verbs.add_parser("sweep", help="train a recipe with several settings, chosen by Optuna; resumable")
    sweep.add_argument(
        "overrides", nargs="+", metavar="key=value",
        help="as for train; vary with key=choice(a,b), key=interval(0,1), 'key=tag(log, interval(1e-4, 1e-2))'",
    )  # fmt: skip
    sweep.add_argument("--trials", type=int, default=20, help="runs in all")
    sweep.add_argument("--seed", type=int, default=0, help="of the choice")

    prefer = verbs.add_parser("prefer", help="train a model on preferred and rejected answers (DPO)")
    prefer.add_argument("model", help="model folder")
    prefer.add_argument("data", help="JSON lines with image, question, chosen and rejected")
    prefer.add_argument("--out", required=True, metavar="FOLDER", help="the new model folder")
    prefer.add_argument("--image-folder", help="where names of pictures start; default: the folder of the data")
    prefer.add_argument("--epochs", type=float, default=1.0)
    prefer.add_argument("--max-steps", type=int)
    prefer.add_argument("--batch-size", type=int, default=8, help="pairs")
    prefer.add_argument("--accumulate", type=int, default=1)
    prefer.add_argument("--lr", type=float, default=5e-6)
    prefer.add_argument("--beta", type=float, default=0.1)
    prefer.add_argument("--max-length", type=int, default=1024, help="tokens at which a conversation is cut")
    prefer.add_argument("--seed", type=int, default=42)
    prefer.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")

    ask = verbs.add_parser("ask", help="ask a model about pictures")
    ask.add_argument("model", help="model folder")
    ask.add_argument("words", nargs="+", metavar="IMAGE... QUESTION", help="pictures, then the question; - reads stdin")
    _add_generation(ask)
    ask.add_argument("--json", action="store_true", help="print one JSON object instead of streaming text")

    caption = verbs.add_parser("caption", help="describe every picture of a folder; resumable")
    caption.add_argument("model", help="model folder")
    caption.add_argument("folder", help="folder of pictures")
    caption.add_argument("--out", required=True, metavar="FILE", help="JSON lines; pictures already in it are skipped")
    caption.add_argument("--prompt", default="", help="words beside the picture")
    caption.add_argument("--batch-size", type=int, default=16)
    _add_ray(caption)
    _add_generation(caption)

    evaluate = verbs.add_parser("evaluate", help="score a model beside its blind and shuffled-picture controls")
    evaluate.add_argument("model", help="model folder")
    evaluate.add_argument(
        "data", nargs="*", metavar="key=value",
        help="benchmark=NAME or format=NAME, and its options; default: the test set of the run",
    )  # fmt: skip
    evaluate.add_argument("--out", metavar="FOLDER", help="report.json, predictions.jsonl, report.html; resumable")
    evaluate.add_argument(
        "--relevance", type=int, default=4, metavar="N",
        help="for N shown questions the report says which places of the picture the answer depended on; not with --ray",
    )  # fmt: skip
    evaluate.add_argument("--limit", type=int, help="a random choice of so many questions")
    evaluate.add_argument("--batch-size", type=int, default=64)
    evaluate.add_argument("--max-new-tokens", type=int, help="of an answer; default: what the benchmark needs")
    _add_ray(evaluate)
    _add_device(evaluate)

    compare = verbs.add_parser("compare", help="which of two evaluations of the same questions is better, and how sure")
    compare.add_argument("a", metavar="A", help="folder of a run or of evaluate --out, such as runs/NAME/before")
    compare.add_argument("b", metavar="B", help="another one, such as runs/NAME")
    compare.add_argument("--out", metavar="FOLDER", help="comparison.json and comparison.html")

    inspect = verbs.add_parser("inspect", help="look at data, a batch or a model before training")
    inspect.add_argument("what", choices=["data", "batch", "model", "patches", "attention"])
    inspect.add_argument(
        "target", nargs="+", metavar="MODEL or key=value",
        help="model folder, or recipe=NAME and settings; patches: model folder and pictures; attention: model folder, "
        "one picture and a question",
    )  # fmt: skip
    inspect.add_argument("-n", type=int, default=6, help="number of samples")
    inspect.add_argument("--out", metavar="FILE", help="also write a picture (PNG) of what is shown; attention: folder")

    data = verbs.add_parser("data", help="what the training data holds, what is left out and what is there twice")
    data.add_argument("what", choices=["report"])
    data.add_argument("target", nargs="+", metavar="key=value", help="recipe=NAME and settings")
    data.add_argument("--out", default="data-report", metavar="FOLDER", help="where report.html and report.json go")

    push = verbs.add_parser("push", help="show what would go to the Hugging Face Hub, and with --yes send it")
    push.add_argument("source", metavar="RUN or MODEL", help="folder of a finished run, or of its model")
    push.add_argument("repo", metavar="OWNER/NAME", help="made if there is none")
    push.add_argument("questions", nargs="*", metavar="key=value", help="for the check of --space, as for evaluate")
    push.add_argument("--yes", action="store_true", help="send it")
    push.add_argument("--space", action="store_true", help="a page with the model, which has to look at pictures")
    push.add_argument("--private", action="store_true", help="if the repository is made")
    push.add_argument("--license", metavar="ID", help="of a model that is made of no pretrained weights")
    push.add_argument("--out", metavar="FOLDER", help="keep what would go")

    download = verbs.add_parser("download", help="fetch a model from the Hugging Face Hub; an interrupted one goes on")
    download.add_argument("repo", metavar="OWNER/NAME")
    download.add_argument("--out", required=True, metavar="FOLDER", help="the model folder")
    download.add_argument("--revision", help="commit, branch or tag")

    imports = verbs.add_parser("import", help="turn a LLaVA, a nanoVLM or a Lightning checkpoint into a model folder")
    imports.add_argument("kind", choices=IMPORTS.names())
    imports.add_argument("source", help="folder, file or Hub name")
    imports.add_argument(
        "settings", nargs="*", metavar="key=value", help="lightning: recipe=NAME and settings of the model"
    )
    imports.add_argument("--out", required=True, metavar="FOLDER", help="the new model folder")
    imports.add_argument("--vision", metavar="FOLDER", help="pretrained vision encoder (llava, lightning)")
    imports.add_argument("--language", metavar="FOLDER", help="pretrained language model (lightning)")
    imports.add_argument("--tokenizer", metavar="FOLDER", help="tokenizer, if not the source's own (llava, nanovlm)")
    imports.add_argument("--template", metavar="FILE", help="chat template, if not the source's own (llava)")
    imports.add_argument(
        "--rename", action="append", metavar="old=new", help="beginnings of names of tensors (lightning); repeatable"
    )
    imports.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], help="of the weights")

    export = verbs.add_parser("export", help="write a model for other programs, and check that it answers the same")
    export.add_argument("model", help="model folder")
    export.add_argument("format", metavar="FORMAT", help=f"one of {', '.join(EXPORTS)}")
    export.add_argument("--out", required=True, metavar="FOLDER", help="new folder")
    export.add_argument("--pictures", nargs="+", default=[], metavar="FILE", help="to check on; default: ten drawn")
    export.add_argument("--adapter", metavar="FOLDER", help="an adapter that peft (TRL) trained on this model")

    plan = verbs.add_parser("plan", help="parameters, FLOPs, memory, time and cost of a run, before it starts")
    plan.add_argument("overrides", nargs="+", metavar="key=value", help="as for train")
    plan.add_argument(
        "--devices", nargs="+", default=["here", "A10", "A100-40", "A100-80", "H100", "H200"], metavar="NAME",
        help="here (this machine, measured for ten seconds) and GPUs; NAME=DOLLARS for another price an hour",
    )  # fmt: skip
    plan.add_argument("--json", metavar="FILE", help="write the plan there, too")
    plan.add_argument(
        "--assume", type=int, nargs=3, metavar=("SAMPLES", "TEXT", "LEARNED"),
        help="of data that is not here: samples, tokens of text in each, and those that are learned",
    )  # fmt: skip
    plan.add_argument("--fresh", action="store_true", help="measure this machine again")

    cache = verbs.add_parser("cache", help="features of pictures that frozen encoders have seen, kept on disk")
    cache.add_argument("what", choices=["show", "fill", "clear"])
    cache.add_argument(
        "target", nargs="*", metavar="ENCODER or key=value", help="clear: one encoder; fill: recipe=NAME and settings"
    )
    _add_ray(cache)

    _add_serve(verbs.add_parser("serve", help="answer OpenAI's API, and a page for people, over HTTP"))
    return top


def _add_serve(verb: argparse.ArgumentParser) -> None:
    from dataclasses import fields

    from eyespot.serving.limits import Limits

    verb.add_argument("models", nargs="+", metavar="MODEL", help="model folder; several are served side by side")
    verb.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines ask")
    verb.add_argument("--port", type=int, default=8000)
    verb.add_argument("--name", action="append", default=[], help="of a model, for clients; once for each model")
    verb.add_argument("--api-key", default=os.environ.get("EYESPOT_API_KEY") or None, help="default: EYESPOT_API_KEY")
    verb.add_argument("--allow-urls", action="store_true", help="fetch pictures from public http(s) addresses")
    verb.add_argument("--no-page", action="store_true", help="the API alone")
    verb.add_argument(
        "--example", nargs=2, action="append", default=[], metavar=("PICTURE", "QUESTION"),
        help="on the page; as often as wanted",
    )  # fmt: skip
    for limit in fields(Limits):
        verb.add_argument(
            f"--{limit.name.replace('_', '-')}", type=type(limit.default), default=limit.default, metavar="N",
            help=f"{limit.metadata['help']}; default: %(default)s",
        )  # fmt: skip
    _add_device(verb)


def _add_ray(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--ray", type=int, metavar="N", help="N workers on Ray: the cluster of RAY_ADDRESS, or here")


def _add_generation(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--max-new-tokens", type=int, default=64)
    verb.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    verb.add_argument("--top-p", type=float)
    verb.add_argument("--top-k", type=int)
    verb.add_argument("--num-beams", type=int)
    verb.add_argument("--repetition-penalty", type=float)
    verb.add_argument("--seed", type=int, default=0)
    _add_device(verb)


def _add_device(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    verb.add_argument("--adapter", metavar="FOLDER", help="an adapter that peft (TRL) trained on this model")
    verb.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16", "int8"], help="int8: quicker on a CPU"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code: 0 done, 1 training failed, 2 unusable input, 130 stopped by Ctrl+C.

    Unusable input is one line on stderr; EYESPOT_DEBUG=1 shows the traceback as well.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    top = parser()
    flags = [word for word in words if word == "--fresh"]  # argparse would not find it between settings
    options = top.parse_args([*(word for word in words if word not in flags), *flags])
    if options.version:
        from eyespot import __version__

        print(f"eyespot {__version__}")
        return 0
    if options.verb is None:
        top.print_help()
        return 0
    try:
        if options.verb != "train":
            _no_bars()
        return VERBS[options.verb](options, words)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except (ValueError, ImportError, OSError) as error:
        if os.environ.get("EYESPOT_DEBUG") == "1":
            raise
        print(f"eyespot {options.verb}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def train(options: argparse.Namespace, words: Sequence[str]) -> int:
    """Train, then evaluate and write the page."""
    from rich.console import Console

    from eyespot.evaluation.finish import BeforeAndAfter
    from eyespot.evaluation.pictures import Pictures
    from eyespot.evaluation.retrieval import measure_retrieval
    from eyespot.plan.compare import compare as compare_with_plan
    from eyespot.relevance import trace_shown
    from eyespot.training.module import ProcessLost, TrainingStopped
    from eyespot.training.processes import is_first_process
    from eyespot.training.run import compose_settings, finished_run
    from eyespot.training.run import train as run_training
    from eyespot.training.tracking import end_interrupted, log_results

    settings = compose_settings(options.overrides)
    console = Console(stderr=True)
    closing = BeforeAndAfter(settings) if settings.evaluation.run and is_first_process() else None
    pictures = Pictures(settings) if settings.evaluation.pictures and is_first_process() else None

    def ask_untrained(assistant: Any) -> None:
        for part in (closing, pictures):
            if part is not None:
                part.ask_untrained(assistant)

    command = shlex.join(["eyespot", *words])
    try:
        unreported = closing is not None and not options.fresh and not closing.is_written()
        earlier = finished_run(settings) if unreported else None
        run = earlier or run_training(
            settings, fresh=options.fresh, console=console, before_training=ask_untrained, measure=measure_retrieval
        )
    except TrainingStopped as error:
        if is_first_process() or isinstance(error, ProcessLost):
            print(f"eyespot train: {error}", file=sys.stderr)
        return 1
    if not is_first_process():
        return 0
    if not run.finished:
        resume = shlex.join(["eyespot", *(word for word in words if word != "--fresh")])
        print(f"stopped by {run.stopped_by} at step {run.steps}, saved; to go on: {resume}")
        end_interrupted(settings)
        return 130
    print(f"model: {run.model_folder}")
    if pictures is not None:
        _draw(pictures, run)
    if closing is not None:
        evaluation = closing.finish(run, command, trace_shown)
        print_evaluation(evaluation, closing.before)
        print(f"report: {run.folder / 'report.json'} and {run.folder / 'report.html'}")
    compare_with_plan(run, settings, console, trained=earlier is None)
    for place in log_results(settings, closing.samples if closing is not None else ()):
        print(place)
    return 0


def _draw(pictures: Any, run: Any) -> None:
    """The pictures of a run, which are no reason to fail after hours of training."""
    try:
        for file in pictures.write(run):
            print(f"picture: {file}")
    except ImportError as error:
        print(f"nothing is drawn: {error}", file=sys.stderr)


def print_evaluation(evaluation: Any, before: Any = None) -> None:
    """Scores, controls, verdict and, after training, answers before and after."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if before is not None:
        earlier = {prediction.id: prediction for prediction in before.predictions}
        table = Table(title="the same questions before and after training", box=None, pad_edge=False)
        for name in ("picture", "question", "truth", "before", "after", "blind"):
            table.add_column(name)
        for p in (p for p in evaluation.predictions if p.id in earlier):
            cells = [
                p.group,
                p.question,
                p.answers[0],
                earlier[p.id].prediction,
                p.prediction,
                p.blind_prediction or "",
            ]
            table.add_row(*(cell.replace("[", "\\[").replace("\n", " ")[:48] for cell in cells))
        console.print(table)
    sign = "%" if evaluation.limit == 1 else ""

    def shown(score: Any) -> str:
        low, high = score.interval
        return f"{100 * score.accuracy:.1f}{sign} [{100 * low:.1f}{sign}, {100 * high:.1f}{sign}]"

    print(f"{evaluation.measure} {shown(evaluation)} on {evaluation.num_questions:,} questions")
    for name, score in evaluation.controls.items():
        print(f"  {name}: {shown(score)}")
    for name, value in evaluation.figures.get("pictures", {}).items():
        print(f"  {name}: {value:.3f}")
    print(evaluation.verdict)


def sweep(options: argparse.Namespace, words: Sequence[str]) -> int:
    """Train many runs and say which was best."""
    from rich.console import Console

    from eyespot.training.sweep import run_sweep

    found = run_sweep(options.overrides, trials=options.trials, seed=options.seed, console=Console(stderr=True))
    print(f"{len(found.trials)} trials: {found.folder / 'sweep.json'}")
    if found.best is not None:
        print(f"best: validation loss {found.best.loss:.4f} with {shlex.join(found.best.overrides)}")
    if not found.finished:
        print(f"stopped, saved; to go on: {shlex.join(['eyespot', *words])}")
        return 130
    return 0


def prefer(options: argparse.Namespace, words: Sequence[str]) -> int:
    """Train a model on preferences."""
    from eyespot.training.preference import run_preference

    names = ("image_folder", "epochs", "max_steps", "batch_size", "accumulate", "lr", "beta", "max_length", "seed")
    result = run_preference(
        options.model, options.data, options.out, device=options.device,
        **{name: getattr(options, name) for name in names},
    )  # fmt: skip
    print(f"{len(result.losses)} steps, loss {result.losses[0]:.4f} to {result.losses[-1]:.4f}, "
          f"margin {result.margins[0]:.4f} to {result.margins[-1]:.4f}")  # fmt: skip
    print(f"model: {result.folder}")
    return 0


def ask(options: argparse.Namespace, words: Sequence[str]) -> int:
    """Answer one question."""
    *images, question = options.words
    images = [_stdin_bytes() if image == "-" else image for image in images]
    if question == "-":
        question = sys.stdin.read().strip()
    assistant = _assistant(options)
    if options.json:
        answer = assistant.ask(images, question, **_generation(options))
        shown = [image if isinstance(image, str) else "-" for image in images]
        print(json.dumps({"images": shown, "question": question, "answer": answer}, ensure_ascii=False))
        return 0
    if options.num_beams and options.num_beams > 1:
        print(assistant.ask(images, question, **_generation(options)))
        return 0
    for piece in assistant.stream(images, question, **_generation(options)):
        print(piece, end="", flush=True)
    print()
    return 0


def _stdin_bytes() -> bytes:
    return sys.stdin.buffer.read()


def caption(options: argparse.Namespace, words: Sequence[str]) -> int:
    """Describe a folder of pictures."""
    folder, out = Path(options.folder), Path(options.out)
    how = {"prompt": options.prompt, "batch_size": options.batch_size, **_generation(options)}
    if options.ray is None:
        from eyespot.evaluation.caption import caption_folder

        done, failed = caption_folder(_assistant(options), folder, out, **how)
    else:
        from eyespot.ray_jobs import caption_with_ray

        done, failed = caption_with_ray(_model(options), folder, out, options.ray, **how)
    print(f"{done} captions and {failed} unreadable pictures written to {options.out}")
    return 0


def evaluate(options: argparse.Namespace, words: Sequence[str]) -> int:
    """Score a model with its controls."""
    from eyespot.evaluation.benchmarks.retrieval import RetrievalBenchmark
    from eyespot.evaluation.finish import identity_of, journal_in, load_test, source_of
    from eyespot.evaluation.report import write_page
    from eyespot.evaluation.runner import evaluate as run_evaluation
    from eyespot.inference import load
    from eyespot.relevance import trace_shown

    benchmark, samples = load_test(source_of(options.model, options.data), options.limit)
    if isinstance(benchmark, RetrievalBenchmark):
        return _retrieve(options, benchmark, samples)
    folder = Path(options.out) if options.out else None
    journal = None
    if folder is not None:
        identity = identity_of(options.model, options.dtype, options.adapter)
        journal = journal_in(folder, identity, benchmark, options.max_new_tokens)
    how = {
        "name": str(options.model), "benchmark": benchmark, "batch_size": options.batch_size,
        "max_new_tokens": options.max_new_tokens, "journal": journal,
    }  # fmt: skip
    assistant = None if options.ray is not None else load(*_model(options))
    if assistant is not None:
        with assistant.folded():
            evaluation = run_evaluation(assistant, samples, **how)
    else:
        from eyespot.ray_jobs import evaluate_with_ray

        evaluation = evaluate_with_ray(_model(options), samples, options.ray, **how)
    print_evaluation(evaluation)
    if folder is not None and journal is not None:
        evaluation.write(folder)
        relevance = trace_shown(assistant, evaluation, samples, options.relevance) if assistant is not None else None
        write_page(
            folder / "report.html", evaluation, title=f"eyespot: {options.model}", samples=samples,
            relevance=relevance, command=shlex.join(["eyespot", *words]),
        )  # fmt: skip
        journal.close()
        print(f"report: {folder / 'report.json'} and {folder / 'report.html'}")
    return 0


def _retrieve(options: argparse.Namespace, benchmark: Any, samples: Sequence[Any]) -> int:
    """Score how well a model finds texts for pictures and pictures for texts."""
    from rich.console import Console

    from eyespot.evaluation.benchmarks.retrieval import show
    from eyespot.inference import load

    for option in ("ray", "max_new_tokens"):
        if (value := getattr(options, option)) is not None:
            raise ValueError(f"--{option.replace('_', '-')} is {value}, but benchmark=retrieval asks nothing; drop it")
    found = benchmark.find(load(*_model(options)), samples, options.batch_size)
    show(found, Console())
    if options.out:
        print(f"report: {benchmark.write(Path(options.out), found, options.model)}")
    return 0


def compare(options: argparse.Namespace, words: Sequence[str]) -> int:
    """Say which of two evaluations is better."""
    from rich.console import Console

    from eyespot.evaluation.compare import compare as compare_folders
    from eyespot.evaluation.compare_page import show, write_page

    comparison = compare_folders(options.a, options.b)
    show(comparison, Console())
    if options.out:
        page = write_page(options.out, comparison, shlex.join(["eyespot", *words]))
        print(f"report: {comparison.write(options.out)} and {page}")
    return 0


def inspect(options: argparse.Namespace, words: Sequence[str]) -> int:
    """Show data, a batch or a model."""
    from eyespot import inspection

    out = Path(options.out) if options.out else None
    if options.what == "model":
        inspection.show_model(options.target, out)
    elif options.what == "patches":
        from eyespot.evaluation.pictures import draw_patches
        from eyespot.inference import load

        model, *pictures = options.target
        if not pictures or out is None:
            raise ValueError("inspect patches needs a model folder, one picture or more, and --out FILE.png")
        draw_patches(load(model), pictures, out)
        print(f"picture: {out}")
    elif options.what == "attention":
        from eyespot.inference import load
        from eyespot.relevance import show_attention

        if len(options.target) != 3 or out is None:
            raise ValueError("inspect attention needs a model folder, one picture, a question, and --out FOLDER")
        model, picture, question = options.target
        show_attention(load(model), picture, question, out, shlex.join(["eyespot", *words]))
    else:
        from eyespot.training.run import compose_settings

        settings = compose_settings(options.target)
        show = inspection.show_data if options.what == "data" else inspection.show_batch
        show(settings, options.n, out)
    return 0


def data(options: argparse.Namespace, words: Sequence[str]) -> int:
    """Write a page about the training data of a recipe."""
    from eyespot.compose import build_from_settings
    from eyespot.data import report, report_page
    from eyespot.evaluation.page import STYLE
    from eyespot.training.run import compose_settings, load_samples, make_augmenter, with_tokenizer

    settings = compose_settings(options.target)
    samples, load_report = load_samples(settings.data)
    _, processor = build_from_settings(with_tokenizer(settings.model, samples))
    described = report.describe(
        samples, load_report, settings.data, processor, make_augmenter(settings.data), settings.trainer.seed
    )
    page = report_page.write(
        Path(options.out), described, title=f"Data of {settings.name}", style=STYLE,
        command=shlex.join(["eyespot", *words]), max_length=settings.data.max_length,
    )  # fmt: skip
    load_report.write(Path(options.out))
    print(load_report.summary())
    print(f"report: {page} and {page.with_suffix('.json')}")
    return 0


def cache(options: argparse.Namespace, words: Sequence[str]) -> int:
    """Show, fill or clear the feature cache."""
    from eyespot.data import features

    root = features.features_root()
    if options.ray is not None and options.what != "fill":
        raise ValueError(f"--ray is for fill, {options.what} was asked for; leave it out")
    if options.what == "clear":
        if len(options.target) > 1:
            raise ValueError(f"clear takes one encoder or none for all, {len(options.target)} were given")
        freed = features.clear(root, *options.target)
        if not options.target:
            from eyespot.data import streaming

            freed += streaming.clear()
        print(f"{freed / 1e6:,.1f} MB freed")
        return 0
    if options.what == "fill":
        from rich.console import Console

        from eyespot.training.run import compose_settings, fill_features

        settings, console = compose_settings(options.target), Console(stderr=True)
        if options.ray is None:
            fill_features(settings, console)
        else:
            from eyespot.ray_jobs import fill_with_ray

            fill_with_ray(settings, options.ray, console)
    elif options.target:
        raise ValueError(f"show takes nothing more, {options.target[0]!r} was given")
    print_features(root)
    return 0


def push(options: argparse.Namespace, words: Sequence[str]) -> int:
    """Show, or send, a model or a Space."""
    from eyespot.export.push import push as push_to_hub

    names = ("space", "yes", "private", "out", "questions")
    given = {name: getattr(options, name) for name in names}
    for line in push_to_hub(options.source, options.repo, licence=options.license, **given):
        print(line, flush=True)
    return 0


def download(options: argparse.Namespace, words: Sequence[str]) -> int:
    """Fetch a model."""
    from eyespot.export.hub import download as download_from_hub

    commit = download_from_hub(options.repo, options.out, options.revision)
    print(f"model: {options.out} (commit {commit})")
    return 0


def import_(options: argparse.Namespace, words: Sequence[str]) -> int:
    """Write a model of another project as a folder of ours."""
    from eyespot.importing import import_model

    names = ("settings", "vision", "language", "tokenizer", "template", "rename", "dtype")
    given = {name: getattr(options, name) for name in names}
    for note in import_model(options.kind, options.source, options.out, **given):
        print(f"note: {note}")
    print(f"model: {options.out}")
    return 0


def export(options: argparse.Namespace, words: Sequence[str]) -> int:
    """Write a model in another format."""
    from eyespot.export.parity import check_target, export_model
    from eyespot.inference import load

    check_target(options.format, options.out)
    assistant = load(options.model, "cpu", "float32", options.adapter)
    print(export_model(assistant, options.format, options.out, options.pictures).summary())
    print(f"export: {options.out}")
    return 0


def serve(options: argparse.Namespace, words: Sequence[str]) -> int:
    """Answer over HTTP until the process is stopped."""
    from dataclasses import fields

    from eyespot.serving.limits import Limits
    from eyespot.serving.server import serve as run_server

    limits = Limits(**{limit.name: getattr(options, limit.name) for limit in fields(Limits)})
    names = ("host", "port", "api_key", "allow_urls", "device", "dtype", "adapter")
    how = {name: getattr(options, name) for name in names}
    run_server(
        options.models, names=options.name, page=not options.no_page, examples=options.example, limits=limits, **how
    )
    return 0


def print_features(root: Path) -> None:
    """A table of what is cached."""
    from datetime import datetime

    from rich.console import Console
    from rich.table import Table

    from eyespot.data.features import stored

    rows = stored(root)
    table = Table(box=None, pad_edge=False)
    table.add_column("encoder", no_wrap=True, min_width=16)  # the whole name is what `clear` takes
    for name in ("what it is", "pictures", "tokens x width", "size", "last used"):
        table.add_column(name, justify="right" if name in ("pictures", "size") else "left")
    for row in rows:
        used = datetime.fromtimestamp(row.used).astimezone().isoformat(" ", "minutes")
        shape = " x ".join(map(str, row.shape))
        table.add_row(row.key, row.name, f"{row.num_pictures:,}", shape, f"{row.num_bytes / 1e6:,.1f} MB", used)
    Console().print(table)
    print(f"{sum(row.num_bytes for row in rows) / 1e6:,.1f} MB in {root}")


def _no_bars() -> None:
    """transformers shows a bar for every file that it loads."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _assistant(options: argparse.Namespace) -> Any:
    from eyespot.inference import load

    if options.temperature > 0:
        import torch

        torch.manual_seed(options.seed)
    return load(*_model(options))


def _model(options: argparse.Namespace) -> tuple[Any, ...]:
    """The arguments of ``eyespot.load``."""
    return options.model, options.device, options.dtype, options.adapter


def _generation(options: argparse.Namespace) -> dict[str, Any]:
    names = ("max_new_tokens", "temperature", "top_p", "top_k", "num_beams", "repetition_penalty")
    given = {name: getattr(options, name) for name in names}
    return {name: value for name, value in given.items() if value is not None}


def plan(options: argparse.Namespace, words: Sequence[str]) -> int:
    """Say what a run will need."""
    from rich.console import Console

    from eyespot.plan import Assumed, make_plan, remember, show
    from eyespot.training.run import compose_settings

    settings = compose_settings(options.overrides)
    assumed = Assumed(*options.assume) if options.assume else None
    planned = make_plan(settings, options.devices, assumed=assumed, fresh=options.fresh)
    show(planned, Console())
    remember(planned, settings)
    if options.json:
        Path(options.json).write_text(json.dumps(planned.to_dict(), indent=2) + "\n", encoding="utf-8")
    return 0


VERBS = {
    "train": train, "sweep": sweep, "prefer": prefer, "ask": ask, "caption": caption, "evaluate": evaluate,
    "compare": compare, "inspect": inspect, "data": data, "cache": cache, "serve": serve,
    "import": import_, "plan": plan, "push": push, "download": download, "export": export,
}  # fmt: skip


def script() -> None:
    """Entry point of the ``eyespot`` command."""
    sys.exit(main())
