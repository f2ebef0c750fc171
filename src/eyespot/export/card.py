"""The model card: what a run recorded of itself, as a README for the Hub.

Nothing is written that the record does not hold. Source of the metadata:
https://github.com/huggingface/hub-docs/blob/main/modelcard.md
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from eyespot.config import sources_of
from eyespot.export.licences import HUB, Part, Terms, data_of, strictest, weights_of

RECORD_FILE, REPORT_FILE = "training.json", "report.json"
CLOSE = 0.05  # a kind of question whose score is not so far above its blind score says little about sight
PLOTS = {"before_after.png": "Answers before and after training", "loss.png": "Loss"}


@dataclass(frozen=True)
class Record:
    """What a run left.

    model: the folder with config.json. training: its training.json. report: of the evaluation, None if there was none.
    plots: PNG files of PLOTS.
    """

    model: Path
    training: Mapping[str, Any]
    report: Mapping[str, Any] | None
    plots: tuple[Path, ...]

    @property
    def settings(self) -> Mapping[str, Any]:
        settings: Mapping[str, Any] = self.training["settings"]
        return settings

    @property
    def name(self) -> str:
        return str(self.settings["name"])

    @property
    def weights(self) -> list[Part]:
        return weights_of(self.settings["model"])

    @property
    def data(self) -> list[Part]:
        """What was learned from, in all stages, and what was asked at the end."""
        own = self.settings["data"]["train"]
        stages = [stage.get("data") or {} for stage in self.settings.get("stages") or [{}]]
        trained = [data if "path" in data else data.get("train") or own for data in stages]  # a path: of preferences
        if self.preference:
            trained.append({"path": self.preference["data"]})
        sources = [("training", source) for train in trained for source in sources_of(train).values()]
        return data_of([*sources, *([("test", self.tested)] if self.tested else [])])

    @property
    def tested(self) -> Mapping[str, Any] | None:
        """The source of the questions in the report."""
        if self.report is None:
            return None
        asked: Mapping[str, Any] | None = self.report.get("settings", {}).get("source")
        return asked or self.settings["data"].get("test")

    @property
    def preference(self) -> Mapping[str, Any] | None:
        """What ``eyespot prefer`` did to the model afterwards."""
        found: Mapping[str, Any] | None = self.training.get("preference")
        return found


def read_record(folder: str | Path) -> Record:
    """The record of a run folder, or of its model folder alone.

    Raises:
        ValueError: no trained model there.
    """
    folder = Path(folder)
    model = folder / "model" if (folder / "model" / "config.json").is_file() else folder
    for name in ("config.json", RECORD_FILE):
        if not (model / name).is_file():
            raise ValueError(f"{str(folder)!r} has no {name}; give the folder of a finished run, or its folder model")
    run = model.parent if (model.parent / "settings.json").is_file() and model.name == "model" else model
    report = json.loads((run / REPORT_FILE).read_text("utf-8")) if (run / REPORT_FILE).is_file() else None
    training = json.loads((model / RECORD_FILE).read_text("utf-8"))
    if "settings" not in training:
        raise ValueError(
            f"{str(model / RECORD_FILE)!r} holds no settings: what the model was made of is not known, so no card can "
            "be written; push a model that eyespot trained"
        )
    return Record(model, training, report, tuple(run / name for name in PLOTS if (run / name).is_file()))


def write_card(record: Record, repo: str, licence: str | None = None, folder: str | None = None) -> str:
    """The text of README.md.

    Args:
        repo: where the model will be, "name/model".
        licence: of a model that is made of no pretrained weights; what those ask for is not for us to choose.
        folder: of the model in a repository that holds more, such as a Space.

    Raises:
        ValueError: a licence was given beside that of the weights.
    """
    terms = licence_of(record, licence)
    parts = [
        f"# {repo.partition('/')[2] or repo}", *_verdict(record), *_scores(record), *_pictures(record),
        *_use(repo, folder), *_made_of(record, terms), *_training(record), *_reproduce(record), *_limits(record),
    ]  # fmt: skip
    return f"---\n{metadata(record, repo, terms).to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"


def licence_of(record: Record, licence: str | None) -> Terms | None:
    """The terms of the model as a whole; see ``write_card``."""
    derived = strictest(record.weights)
    if derived is not None and licence not in (None, derived.name):
        raise ValueError(f"--license is {licence!r}, but the model is made of weights under {derived.name!r}; drop it")
    return derived or (Terms(licence, "") if licence else None)


def metadata(record: Record, repo: str, terms: Terms | None) -> ModelCardData:
    """What the Hub reads: licence, base models, data sets, and the scores with their controls."""
    ids = [part.terms.url for part in record.data if part.terms and part.terms.url.startswith(f"{HUB}datasets/")]
    return ModelCardData(
        license=terms.name if terms else None,
        license_name="terms-of-the-parts" if terms and terms.name == "other" else None,
        base_model=[part.name for part in record.weights if "/" in part.name] or None,
        datasets=list(dict.fromkeys(url.removeprefix(f"{HUB}datasets/") for url in ids)) or None,
        tags=["eyespot", "vision-language-model", "image-text-to-text"],
        library_name="eyespot",
        pipeline_tag="image-text-to-text",
        model_name=repo.partition("/")[2] or repo,
        eval_results=_results(record) or None,
    )


def _results(record: Record) -> list[EvalResult]:
    """The score and, as measures of their own, the same questions without their pictures."""
    if record.report is None:
        return []
    measure = record.report.get("measure", "accuracy")
    scores = {measure: record.report["accuracy"]}
    scores |= {f"{measure}, {name} control": c["accuracy"] for name, c in record.report["controls"].items()}
    tested = [part for part in record.data if part.role == "test"]
    name = tested[0].name if tested else record.report.get("benchmark", "questions")
    split = (record.tested or {}).get("split")
    return [
        EvalResult(
            task_type="visual-question-answering", dataset_type=name, dataset_name=name, dataset_split=split,
            metric_type=measure, metric_name=label, metric_value=round(value, 4),
        )
        for label, value in scores.items()
    ]  # fmt: skip


# --- sections ----------------------------------------------------------------------------------------------------


def _verdict(record: Record) -> Iterator[str]:
    model = record.settings["model"]
    names = ", ".join(f"{part.name} ({part.role})" for part in record.weights) or "no pretrained weights"
    yield (
        f"A small vision-language model, trained with eyespot's settings `{record.name}`: vision encoder "
        f"`{model['vision']['name']}`, connector `{model['connector']['name']}`, language model "
        f"`{model['language']['name']}`; made of {names}."
    )
    if record.report is None:
        yield "**It was not evaluated**: nothing here says whether it looks at pictures."
    else:
        yield f"**Verdict of its evaluation: {record.report['verdict']}**"


def _scores(record: Record) -> Iterator[str]:
    report = record.report
    if report is None:
        return
    percent, limit = report.get("limit", 1.0) == 1, report.get("limit", 1.0)
    yield "## Scores"
    yield (
        f"{report.get('measure', 'accuracy')} on {report['num_questions']:,} questions about "
        f"{report['num_pictures']:,} pictures, {'in percent' if percent else f'at most {limit:g}'}; in brackets the "
        "95% interval (bootstrap over pictures). *blind*: the same questions without their picture. *shuffled*: with "
        "another one. A model that does not beat these does not see."
    )
    rows = [["with its picture", _score(report, percent), ""]]
    for name, control in report["controls"].items():
        worth = report["differences"].get(name, {})
        rows.append([name, _score(control, percent), _difference(worth, percent) if worth else ""])
    yield table(["condition", "score", "the picture is worth"], rows)
    if len(report["by_type"]) > 1:
        controls = list(report["controls"])
        rows = [
            [kind, f"{score['num_questions']:,}", _score(score, percent)]
            + [_number(score["controls"][name], percent) if name in score["controls"] else "" for name in controls]
            for kind, score in report["by_type"].items()
        ]
        yield table(["kind of question", "questions", "score", *controls], rows)


def _number(value: float, percent: bool) -> str:
    return f"{100 * value:.1f}" if percent else f"{value:.3f}"


def _score(score: Mapping[str, Any], percent: bool) -> str:
    return _interval([score["accuracy"], *score["interval"]], percent)


def _difference(difference: Mapping[str, float], percent: bool) -> str:
    return _interval([difference[key] for key in ("difference", "low", "high")], percent)


def _interval(values: Sequence[float], percent: bool) -> str:
    """Of a value and its bounds."""
    value, low, high = (_number(value, percent) for value in values)
    return f"{value} [{low}, {high}]"


def _pictures(record: Record) -> Iterator[str]:
    yield from (f"![{PLOTS[plot.name]}]({plot.name})" for plot in record.plots)


def _use(repo: str, folder: str | None) -> Iterator[str]:
    yield "## Use"
    yield (
        "```python\nimport eyespot\n\n"
        f'assistant = eyespot.load("{folder or repo}")\n'
        'print(assistant.ask("photo.png", "What is in the picture?"))\n```'
    )
    if folder is None:
        yield f'```bash\neyespot download {repo} --out model\neyespot ask model photo.png "What is it?"\n```'
    yield "The folder holds safetensors and JSON only; loading it runs no code from it."


def _made_of(record: Record, terms: Terms | None) -> Iterator[str]:
    yield "## Parts, data and licences"
    whole = "; ".join(filter(None, (f"**{terms.name}**", terms.url, terms.note))) if terms else "no licence was chosen"
    yield f"This model: {whole}."
    rows = []
    for part in (*record.weights, *record.data):
        known = f"{part.terms.name}, {part.terms.url}" if part.terms else "not known here"
        rows.append([part.role, part.name, known, part.terms.note if part.terms else ""])
    yield table(["what", "name", "terms", ""], rows)


def _training(record: Record) -> Iterator[str]:
    training, origin = record.training, record.training.get("origin", {})
    yield "## Training"
    yield (
        f"{training['steps']:,} steps, {training['samples']:,} samples, {_duration(training['seconds'])}"
        + (f" on {origin['hardware']}" if "hardware" in origin else "")
        + "."
    )
    stages = training.get("stages")
    if record.preference:
        yield (
            f"Then {len(record.preference['losses']):,} steps of preference learning (DPO, learning rate "
            f"{record.preference['lr']:g}, beta {record.preference['beta']:g})."
        )
    if stages:
        rows = [
            [s["stage"], ", ".join(f"{part}: {mode}" for part, mode in s["train"].items() if mode != "frozen"),
             f"{s['steps']:,}", f"{s['samples']:,}", _duration(s["seconds"]), f"{s['curve'][-1][1]:.3f}"]
            for s in stages
        ]  # fmt: skip
        yield table(["stage", "what learned", "steps", "samples", "time", "last loss"], rows)
        return
    model, trainer = record.settings["model"], record.settings["trainer"]
    learned = [name for name in ("vision", "connector", "language") if model[name]["train"] != "frozen"]
    rows = [[name, model[name]["train"], f"{trainer['lr'][name]:g}"] for name in learned]
    yield table(["part", "what learned", "learning rate"], rows)


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 7200 else f"{seconds / 60:.1f} minutes"


def _reproduce(record: Record) -> Iterator[str]:
    origin = record.training.get("origin", {})
    yield "## Reproduce"
    commands = [one["command"] for one in (origin, (record.preference or {}).get("origin", {})) if "command" in one]
    if commands:
        yield "```bash\n" + "\n".join(commands) + "\n```"
    yield f"All settings stand in `{RECORD_FILE}`."
    commit = origin.get("eyespot_commit") or origin.get("git_commit")
    facts = {"git commit": commit, "versions": origin.get("versions"), "hardware": origin.get("hardware")}
    known = [f"- {name}: {value}" for name, value in facts.items() if value]
    if known:
        yield "\n".join(known)


def _limits(record: Record) -> Iterator[str]:
    yield "## Limits"
    learned = " and ".join(dict.fromkeys(part.name for part in record.data if part.role == "training"))
    limits = [f"It learned from {learned}. Other pictures, other questions and other languages were not tested."]
    report = record.report
    if report is None:
        limits.append("It was not evaluated, so it may well answer without looking.")
    else:
        if not report["verdict"].startswith("sees:"):
            limits.append(f"{report['verdict'].capitalize()}.")
        limits += [
            f"Questions of kind *{kind}*: {_number(score['accuracy'], True)}% with the picture, "
            f"{_number(score['controls']['blind'], True)}% without; here the picture hardly counts."
            for kind, score in report["by_type"].items()
            if report.get("limit", 1.0) == 1 and score["accuracy"] - score["controls"].get("blind", -1.0) < CLOSE
        ]
    limits += [f"Warning while it trained: {warning['text']}." for warning in record.training.get("warnings", [])]
    limits.append("A small language model makes things up; do not use it where a wrong answer does harm.")
    yield "\n".join(f"- {limit}" for limit in limits)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = (head, ["---"] * len(head), *rows)
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
