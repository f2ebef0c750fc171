"""The engine: many answers in one batch, each as if it were alone."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from eyespot.inference import Assistant
from eyespot.models.lora_linear import LoRALinear
from eyespot.models.vlm import VLM
from eyespot.processing.processor import Processor
from eyespot.serving.engine import End, Engine, Job, Wish
from eyespot.serving.limits import Limits, Seats
from eyespot.serving.memory import Memory
from eyespot.serving.metrics import Metrics
from eyespot.serving.pieces import Pieces
from eyespot.serving.refusals import Refusal
from eyespot.serving.rows import Picture, Prompt, Rows, check_grows
from eyespot.serving.sampling import Sampling
from served import asked, collect, conversations, submit, text_of, tiny_assistant
from tiny import Row, make_row


def engine_of(assistant: Assistant, **limits: Any) -> Engine:
    return Engine(assistant, "tiny", Limits(**limits), Metrics())


@pytest.fixture(scope="module")
def engine(assistant: Assistant) -> Iterator[Engine]:
    with engine_of(assistant, max_batch=5) as engine:
        yield engine


# --- rows ------------------------------------------------------------------------------------------------------------


class _Pads:
    pad_token_id = 0
    pad = Processor.pad


def prompt_of(row: Row, model: VLM) -> Prompt:
    pictures = tuple(Picture(pixels.numpy().tobytes(), pixels) for pixels in row.pixels)
    is_image = [token == model.config.image_token_id for token in row.ids]
    length = len(row.ids) - is_image[::-1].index(True) if pictures else 0
    return Prompt(row.ids, pictures, length if length < len(row.ids) else 0)


def alone(model: VLM, row: Row, new: int) -> list[int]:
    """Greedy tokens without any cache."""
    ids = torch.tensor([row.ids])
    for _ in range(new):
        output = model(input_ids=ids, pixel_values=row.pixels if len(row.pixels) else None)
        ids = torch.cat([ids, output.logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids[0, len(row.ids) :].tolist()


@torch.inference_mode()
def test_rows_that_join_and_leave_say_what_they_say_alone(vlm: VLM) -> None:
    """I4, I5: every language model of the suite, also with windows shorter than the prompts; twice, so that the second
    time the beginnings come from memory."""
    vlm.eval()
    given = [make_row(layout, i) for i, layout in enumerate(("ttitttttttt", "ttt", "titttitt", "tttttttt", "itt"))]
    lasting = (9, 3, 7, 4, 6)
    expected = [alone(vlm, row, new) for row, new in zip(given, lasting, strict=True)]
    rows = Rows(SimpleNamespace(model=vlm, processor=_Pads()))  # type: ignore[arg-type]
    for turn in range(2):
        arriving = {0: [0, 3], 1: [2], 3: [1, 4]}  # step: who joins
        if turn:
            arriving = {0: [0, 2], 2: [4], 4: [1, 3]}
        growing: list[int] = []
        said: dict[int, list[int]] = {}
        for step in range(20):
            for group in [[i] for i in arriving.get(step, [])] if not turn else [arriving.get(step, [])]:
                if group:
                    logits = rows.add([prompt_of(given[i], vlm) for i in group])
                    growing += group
                    said |= {i: [token] for i, token in zip(group, logits.argmax(-1).tolist(), strict=True)}
            staying = [place for place, i in enumerate(growing) if len(said[i]) < lasting[i]]
            if len(staying) < len(growing):
                growing = [growing[place] for place in staying]
                rows.keep(staying)
            if growing:
                for i, token in zip(
                    growing, rows.step([said[i][-1] for i in growing]).argmax(-1).tolist(), strict=True
                ):
                    said[i].append(token)
        assert [said[i] for i in range(5)] == expected, f"turn {turn}"
        assert len(rows) == 0 and len(rows.prefixes) == 3 * rows.shares
        assert (rows.known(prompt_of(given[0], vlm)) is not None) == rows.shares


@torch.inference_mode()
def test_columns_that_nobody_needs_are_let_go(assistant: Assistant) -> None:
    rows = Rows(assistant)
    rows.add([Prompt([5] * 40, (), 0), Prompt([6] * 3, (), 0)])
    rows.step([7, 7])
    assert rows.mask.shape == (2, 41)
    rows.keep([1])
    assert rows.mask.tolist() == [[1] * 4]
    assert all(layer.keys.shape[2] == 4 for layer in rows.cache.layers)


@pytest.mark.parametrize(
    ("kind", "inputs", "lack"),
    [("llama", {"input_ids"}, "no cache of keys and values"),
     ("qwen3_next", {"input_ids", "past_key_values"}, "layers of type 'linear_attention'")],
)  # fmt: skip
def test_a_language_model_whose_answers_cannot_join_is_refused(kind: str, inputs: set[str], lack: str) -> None:
    model = SimpleNamespace(language=SimpleNamespace(config=AutoConfig.for_model(kind)), language_inputs=inputs)
    with pytest.raises(ValueError, match=f"{kind} has {lack}, so answers cannot join"):
        check_grows(model)  # type: ignore[arg-type]


def test_memory_forgets_what_was_used_longest_ago() -> None:
    memory: Memory[str] = Memory(10)
    for key in "abc":
        memory.put(key, key * 2, 4)
    assert (memory.get("a"), memory.get("b"), memory.num_bytes) == (None, "bb", 8)
    memory.put("d", "dd", 4)  # c was used longer ago than b
    assert (memory.get("c"), memory.get("b")) == (None, "bb")
    memory.put("huge", "!", 99)
    assert len(memory) == 1 and memory.get("huge") == "!" and memory.num_bytes == 99
    memory.put("huge", "?", 5)
    assert memory.num_bytes == 5


# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pass_tokens", [0, 96])
def test_every_answer_is_that_of_the_assistant(
    engine: Engine, assistant: Assistant, monkeypatch: pytest.MonkeyPatch, pass_tokens: int
) -> None:
    monkeypatch.setattr("eyespot.serving.engine.PASS_TOKENS", pass_tokens)
    monkeypatch.setattr(engine.rows, "prefixes", Memory(10**8))
    expected = [assistant.generate_text([c], max_new_tokens=3 + i)[0] for i, c in enumerate(conversations())]
    kept = []
    for _ in range(2):
        waiting = [submit(engine, c, Wish(max_new_tokens=3 + i)) for i, c in enumerate(conversations())]
        found = [collect(events) for events in waiting]
        assert [text_of(pieces) for pieces, _ in found] == expected
        kept.append(sum(end.kept_tokens for _, end in found))
    assert len(set(expected)) == 12
    if not pass_tokens:
        assert kept[1] > kept[0]
    for i, (_, end) in enumerate(found):
        assert end.reason == ("length" if end.answer_tokens == 3 + i else "stop") and end.answer_tokens <= 3 + i
    assert "eyespot_batch_rows_sum" in engine.metrics.text().decode()


def test_a_picture_is_encoded_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    encode = engine.assistant.model.encode_images

    def count(pixels: torch.Tensor) -> torch.Tensor:
        seen.append(len(pixels))
        return encode(pixels)

    monkeypatch.setattr(engine.assistant.model, "encode_images", count)
    for words in ("one?", "another?", "one?"):
        collect(submit(engine, asked(words, "navy", "navy"), Wish(2)))
    assert seen == [1]


def test_sampled_answers_repeat_whoever_is_beside_them(engine: Engine) -> None:
    wish = Wish(20, Sampling(temperature=1.2, top_p=0.9, seed=7))
    first = text_of(collect(submit(engine, asked("what?", "red"), wish))[0])
    waiting = [submit(engine, c, wish) for c in [*conversations(), asked("what?", "red")]]
    assert text_of([collect(events) for events in waiting][-1][0]) == first
    others = {
        text_of(collect(submit(engine, asked("what?", "red"), Wish(20, Sampling(1.2, seed=s))))[0]) for s in (1, 2)
    }
    unseeded = {text_of(collect(submit(engine, asked("what?", "red"), Wish(20, Sampling(1.2))))[0]) for _ in range(2)}
    assert len(others | unseeded | {first}) == 5


def test_log_probabilities_are_those_of_the_answer(engine: Engine, assistant: Assistant) -> None:
    conversation = asked("what?", "red")
    pieces, end = collect(submit(engine, conversation, Wish(6, top=3)))
    scores = [score for piece in pieces for score in piece.scores]
    assert len(scores) == end.answer_tokens == 6
    expected = assistant.answer_scored([conversation], 6)[0]
    assert sum(score.log_prob for score in scores) == pytest.approx(expected.log_prob, abs=1e-4)
    assert "".join(score.text for score in scores).strip() == expected.text
    for score in scores:
        assert score.top[0] == (score.text, pytest.approx(score.log_prob)) and len(score.top) == 3
        assert [p for _, p in score.top] == sorted((p for _, p in score.top), reverse=True)


def test_stops_and_ends(engine: Engine, assistant: Assistant) -> None:
    whole = assistant.generate_text([asked("what?", "red")], max_new_tokens=20)[0]
    stop = whole[6:9]
    pieces, end = collect(submit(engine, asked("what?", "red"), Wish(20, stops=("never said", stop))))
    assert text_of(pieces) == whole[: whole.index(stop)].rstrip() and end.reason == "stop"
    assert end.answer_tokens < 20


def test_an_end_token_ends_the_answer(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine_of(assistant) as engine:
        events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        tokens = engine.submit(engine.prepare(*asked("what?", "red")), Wish(12), events.put).tokens
        collect(events)
    place = next(i for i in range(2, 12) if tokens[i] not in tokens[:i])
    monkeypatch.setattr(assistant.model.generation_config, "eos_token_id", [tokens[place]])
    with engine_of(assistant) as engine:
        pieces, end = collect(submit(engine, asked("what?", "red"), Wish(12)))
    assert end.reason == "stop" and end.answer_tokens == place
    assert text_of(pieces) == assistant.generate_text([asked("what?", "red")], max_new_tokens=place)[0]


def test_an_answer_ends_where_the_positions_do(engine: Engine) -> None:
    _, end = collect(submit(engine, asked("w" * 230), Wish(1000)))
    assert end.reason == "length" and end.prompt_tokens + end.answer_tokens == engine.positions


def test_adapters_are_folded_while_it_runs() -> None:
    lora = {"r": 2, "alpha": 8.0, "targets": "attention"}
    assistant = tiny_assistant(train="lora", lora=lora)
    layers = [m for m in assistant.model.modules() if isinstance(m, LoRALinear)]
    expected = assistant.generate_text([asked("what?", "red")], max_new_tokens=8)
    with engine_of(assistant) as engine:
        assert engine.call(lambda: all(layer.merged for layer in layers)) and layers
        assert [text_of(collect(submit(engine, asked("what?", "red"), Wish(8)))[0])] == expected
    assert not any(layer.merged for layer in layers)


# --- what can go wrong -----------------------------------------------------------------------------------------------


def test_a_cancelled_answer_leaves_the_others_alone(engine: Engine, assistant: Assistant) -> None:
    began = threading.Event()
    job = engine.submit(engine.prepare(*asked("long", "red")), Wish(200), lambda event: began.set())
    other = submit(engine, asked("what?", "blue"), Wish(30))
    assert began.wait(20)
    job.cancel()
    assert text_of(collect(other)[0]) == assistant.generate_text([asked("what?", "blue")], max_new_tokens=30)[0]
    assert engine.call(lambda: list(engine.running)) == [] and len(job.tokens) < 200


def test_an_answer_that_is_cancelled_while_it_waits_is_never_begun(engine: Engine) -> None:
    begin = threading.Event()
    busy = threading.Thread(target=engine.call, args=(begin.wait,))
    busy.start()
    job = engine.submit(engine.prepare(*asked("what?", "red")), Wish(5), print)
    job.cancel()
    begin.set()
    busy.join()
    collect(submit(engine, asked("next"), Wish(1)))
    assert job.ended and not job.tokens


def test_scored_tokens_joined_are_the_answer(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by a decoder that drops the space before the first word, as Llama's does."""
    words = ["▁the", "▁red", "s", "the"]
    monkeypatch.setattr(
        engine, "_decode", lambda tokens: "".join(words[i] for i in tokens).replace("▁", " ").removeprefix(" ")
    )
    logits = torch.tensor([1.0, 4.0, 2.0, 3.0])
    answer = [0, 1, 2]
    scores = [engine._score(logits, answer[:number], 4) for number in (1, 2, 3)]
    assert [score.text for score in scores] == ["the", " red", "s"]
    assert [text for text, _ in scores[1].top] == [" red", "the", "s", " the"]


def test_who_leaves_while_all_rows_are_taken_leaves_nothing_behind(assistant: Assistant) -> None:
    with engine_of(assistant, max_batch=1) as engine:
        began, events = threading.Event(), queue.SimpleQueue[Any]()

        def emit(event: Any) -> None:
            began.set()
            events.put(event)

        engine.submit(engine.prepare(*asked("long")), Wish(200), emit)
        assert began.wait(20)
        others = [engine.submit(engine.prepare(*asked("what?", "red")), Wish(5), print) for _ in range(20)]
        for other in others[1:]:
            other.cancel()
        while len(engine.waiting) > 1:
            assert engine.running, "they stayed until the row was free"
            time.sleep(0.001)
        assert list(engine.waiting) == others[:1]
        collect(events)


def test_a_failed_step_ends_its_answers_and_nothing_else(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine.rows, "step", fail)
        with pytest.raises(Refusal, match="the model failed while it answered") as refused:
            collect(submit(engine, asked("what?"), Wish(5)))
        patch.setattr(engine.rows, "add", fail)
        with pytest.raises(Refusal):
            collect(submit(engine, asked("what?"), Wish(5)))
    assert refused.value.status == 500 and "out of memory" in caplog.text
    assert collect(submit(engine, asked("what?"), Wish(5)))[1].answer_tokens == 5


def test_closing_finishes_what_runs_and_refuses_what_comes(assistant: Assistant) -> None:
    with engine_of(assistant, max_batch=2) as engine:
        waiting = [submit(engine, c, Wish(20)) for c in conversations()]
        prompt = engine.prepare(*asked("late"))
    assert all(isinstance(collect(events)[1], End) for events in waiting)
    assert not engine.is_well
    for late in (lambda: engine.submit(prompt, Wish(), print), lambda: engine.call(print)):
        with pytest.raises(Refusal, match="shutting down") as refused:
            late()
        assert refused.value.status == 503


def test_calls_run_between_steps_and_report_their_errors(engine: Engine) -> None:
    assert engine.call(lambda: threading.current_thread().name) == "eyespot-tiny"
    with pytest.raises(ZeroDivisionError):
        engine.call(lambda: 1 / 0)
    assert engine.call(torch.is_grad_enabled)


def test_a_pass_is_saved_where_it_costs_little(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.rows, "known", lambda prompt: [] if prompt.prefix_length else None)

    def groups(*lengths: tuple[int, int]) -> list[list[int]]:
        jobs = [Job(Prompt([0] * n, (), prefix), Wish(), Pieces(str, ()), print) for n, prefix in lengths]
        return sorted(sorted(len(job.prompt.ids) for job in group) for group in engine._groups(jobs))

    assert groups((20, 0), (44, 0), (30, 0)) == [[20, 30, 44]]
    assert groups((20, 0), (400, 0)) == [[20], [400]]
    assert groups(*[(20, 0)] * 4, (60, 0)) == [[20] * 4, [60]]  # 160 tokens of padding
    assert groups((40, 4), (50, 0)) == [[40, 50]]  # four tokens are sooner computed again
    assert groups((600, 576), (50, 0)) == [[50], [600]]
    assert groups((600, 576), (90, 64)) == [[90, 600]]  # 24 and 26 tokens behind their beginnings
    assert groups() == []


def test_who_is_sent_away_hears_how_long_answers_take(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr("eyespot.serving.limits.time", clock)
    seats = Seats(1)
    found = [seats.retry_after_s]
    for seconds in (11.5, 100.0):
        for _ in range(60):
            with seats.taken():
                clock.now += seconds
        found.append(seats.retry_after_s)
    assert found == [1, 12, 30]


def test_limits_and_seats() -> None:
    with pytest.raises(ValueError, match=r"--max-batch is 0; it must be above 0"):
        Limits(max_batch=0)
    with pytest.raises(ValueError, match=r"--timeout-s is nan"):
        Limits(timeout_s=float("nan"))
    seats = Seats(1)
    with seats.taken(), pytest.raises(Refusal, match="1 requests are waiting") as refused, seats.taken():
        pass
    assert refused.value.status == 429 and int(refused.value.headers["Retry-After"]) >= 1
    with seats.taken():
        pass
