"""Room TUNING, and `tune` on the command line: what is fastest here, as a profile.

Rates come from a function of the layout instead of a clock, so that a test knows the
best one; what a call computes comes from the fake engine.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

import embellama_server as es
from tests import kit
from tests.test_server import SCRIPT, post

Rate = Callable[[es.Layout, int], float]
BASE = es.Layout(4, 1, 256)  # of a Bench
Show = tuple[int, int, str]
T = TypeVar("T", bound=es.Tuner)


class Engine(kit.FakeEngine):
    """Weights as the file says.

    Contexts may be used by any thread: those of a tuner are made before its threads.
    """

    contexts_left = 1 << 30

    def __init__(self, path: str = "", *_: Any) -> None:
        weights = Path(path).read_bytes().removeprefix(es.GGUF_MAGIC) if path else b""
        super().__init__(weights=weights.decode() or "f16")

    def new_context(
        self, *, needs_long_context: bool = False, per_token: bool = False
    ) -> kit.FakeContext:
        if not self.contexts_left:
            raise es.StartupError("no room for another context")
        self.contexts_left -= 1
        with self.lock:
            self.contexts_open += 1
        return Context(self)


class Context(kit.FakeContext):
    """See Engine."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._thread = 0


class Tabled(es.Tuner):
    """A tuner that looks rates up."""

    rate: Rate
    taken: list[tuple[es.Layout, int, float]]
    on_measure: Callable[[float], None]

    def _measure(self, layout: es.Layout, tokens: int, seconds: float) -> float:
        self.taken.append((layout, tokens, seconds))
        self.on_measure(seconds)
        return self.rate(layout, tokens)


@dataclass
class Bench:
    """An engine to measure."""

    engine: Engine = field(default_factory=Engine)
    shown: list[Show] = field(default_factory=list)

    def real(self, *, cores: int = 4, seconds: float = 0.0) -> es.Tuner:
        """A tuner that does measure."""
        return self._made(es.Tuner, cores, seconds)

    def tuner(
        self, rate: Rate = lambda *_: 1.0, *, cores: int = 4, seconds: float = 60
    ) -> Tabled:
        made = self._made(Tabled, cores, seconds)
        made.rate, made.taken, made.on_measure = rate, [], lambda _: None
        return made

    def _made(self, kind: type[T], cores: int, seconds: float) -> T:
        return kind(
            self.engine, seconds, cores, lambda *shown: self.shown.append(shown)
        )


@pytest.fixture
def bench() -> Bench:
    return Bench()


# --- what is best ---


@pytest.mark.parametrize(
    ("faster", "best"),
    [
        ({}, BASE),
        ({"threads": (2, 1.2)}, es.Layout(2, 2, 256)),
        ({"threads": (4, 1.2)}, es.Layout(1, 4, 256)),
        ({"batch_tokens": (512, 1.2)}, es.Layout(4, 1, 512)),
        ({"threads": (2, 2), "batch_tokens": (128, 2)}, es.Layout(2, 2, 128)),
        # What is hardly better may be chance.
        ({"threads": (2, 1.02), "batch_tokens": (128, 1.02)}, BASE),
    ],
)
def test_the_best_layout_is_found_and_a_default_left_for_what_is_clearly_better(
    bench: Bench, faster: dict[str, tuple[Any, float]], best: es.Layout
) -> None:
    def rate(layout: es.Layout, tokens: int) -> float:
        value = 1000.0 / tokens
        for name, (wanted, factor) in faster.items():
            value *= factor if getattr(layout, name) == wanted else 1
        return value

    assert bench.tuner(rate).run(256) == best


FACTORS = st.sampled_from([0.5, 0.97, 1.0, 1.02, 1.1, 1.5])


def winner(factors: dict[Any, float], default: Any) -> Any:
    """The one with the largest factor, unless the default is nearly as good."""
    best = max(factors, key=lambda key: (factors[key], key == default))
    return best if factors[best] / factors[default] > 1.03 else default


@given(
    threads=st.fixed_dictionaries(dict.fromkeys((1, 2, 4), FACTORS)),
    batches=st.fixed_dictionaries(dict.fromkeys((128, 256, 512), FACTORS)),
)
def test_what_is_best_of_each_is_best_together(
    threads: dict[int, float], batches: dict[int, float]
) -> None:
    def rate(layout: es.Layout, tokens: int) -> float:
        return threads[layout.threads] * batches[layout.batch_tokens] / tokens

    found = Bench().tuner(rate).run(256)
    # Of equals any will do: what counts is how fast it is.
    assert threads[found.threads] == threads[winner(threads, 1)]
    assert batches[found.batch_tokens] == batches[winner(batches, 256)]
    assert found.workers == 4 // found.threads


def test_short_and_long_texts_count_the_same(bench: Bench) -> None:
    # Twice as fast for short texts and 0.4 times for long ones is no gain; nor is much
    # gained in inputs a second, of which short ones are many.
    def rate(layout: es.Layout, tokens: int) -> float:
        if layout.threads != 2:
            return 1000 / tokens
        return {24: 2.0, 120: 1.1, 380: 0.4}[tokens] * 1000 / tokens

    assert bench.tuner(rate).run(256) == BASE


def test_a_box_that_drifts_is_measured_in_rounds(bench: Bench) -> None:
    # Every round is slower than the one before; one measurement is disturbed.
    taken = 0

    def rate(layout: es.Layout, tokens: int) -> float:
        nonlocal taken
        taken += 1
        disturbed = 0.01 if taken == 2 else 1.0
        return disturbed * (1.2 if layout.threads == 2 else 1.0) / (1 + taken / 99)

    assert bench.tuner(rate).run(256).threads == 2


@pytest.mark.parametrize(
    ("cores", "layouts"),
    [
        (1, {(1, 1)}),
        (2, {(2, 1), (1, 2)}),
        (3, {(3, 1), (1, 2)}),
        (6, {(6, 1), (3, 2), (1, 4)}),
        (8, {(8, 1), (4, 2), (2, 4), (1, 8)}),
    ],
)
def test_workers_times_threads_are_never_more_than_the_cores(
    bench: Bench, cores: int, layouts: set[tuple[int, int]]
) -> None:
    tuner = bench.tuner(cores=cores)
    tuner.run(256)
    assert {(layout.workers, layout.threads) for layout, *_ in tuner.taken} == layouts


def test_tokens_a_call_that_somebody_chose_are_the_default(bench: Bench) -> None:
    tuner = bench.tuner()
    assert tuner.run(300).batch_tokens == 300
    assert {t[0].batch_tokens for t in tuner.taken} == {300, 128, 256, 512}


# --- the table ---


def test_the_table_has_each_layout_of_each_question_and_marks_the_best(
    bench: Bench,
) -> None:
    tuner = bench.tuner(lambda layout, n: (1.5 if layout.threads == 2 else 1) * 1e4 / n)
    best = tuner.run(256)
    head, rule, *rows = tuner.table(best).splitlines()
    assert {line.count("|") for line in (head, rule, *rows)} == {8}
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert [row[:3] for row in cells] == [
        *(["f16", "4 x 1", "256"], ["f16", "2 x 2", "256"], ["f16", "1 x 4", "256"]),
        *(["f16", "2 x 2", "256"], ["f16", "2 x 2", "128"], ["f16", "2 x 2", "512"]),
    ]
    for row in cells:
        factor = 1.5 if row[1] == "2 x 2" else 1
        assert row[3:6] == [f"{factor * 1e4 / n:.1f}" for n in (24, 120, 380)]
        assert row[6] == ("best" if row[1:3] == ["2 x 2", "256"] else "")


# --- progress and time ---


@pytest.mark.parametrize("cores", [1, 2, 8])
def test_progress_goes_from_nothing_to_all(bench: Bench, cores: int) -> None:
    tuner = bench.tuner(cores=cores)
    tuner.run(256)
    (total,) = {of for _, of, _ in bench.shown}
    assert [done for done, *_ in bench.shown] == list(range(total))
    assert len(tuner.taken) == total
    assert all(what.isprintable() and what for *_, what in bench.shown)


@dataclass
class Clock:
    """Time that passes when somebody measures, as many times too slowly."""

    slowness: float
    now: float = 1000.0

    def passes(self, seconds: float) -> None:
        self.now += seconds * self.slowness


@pytest.mark.parametrize("slowness", [0.5, 1.0, 1.5, 100.0])
def test_measuring_takes_the_time_it_was_given(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, slowness: float
) -> None:
    # A call is never cut short: with a large model a slice may take much longer.
    clock = Clock(slowness)
    monkeypatch.setattr(es, "time", types.SimpleNamespace(monotonic=lambda: clock.now))
    tuner = bench.tuner(seconds=60)
    tuner.on_measure = clock.passes
    begun = clock.now
    tuner.run(256)
    counts = [
        sum(taken[:2] == pair for taken in tuner.taken)
        for pair in {taken[:2] for taken in tuner.taken}
    ]
    assert min(counts) >= 1, "everything is measured once"
    slices = (clock.now - begun) / slowness / tuner.taken[0][2]
    assert slices == pytest.approx(len(tuner.taken))
    if slowness <= 1:
        assert clock.now - begun == pytest.approx(60 * slowness)
    else:
        # After the time is over, the first round of what is still asked.
        rest = (3 + 3) * len(es.TUNE_TEXTS) * tuner.taken[0][2] * slowness
        assert clock.now - begun <= 60 + rest
    if slowness > 10:
        assert set(counts) <= {1, 2, 3}
        assert len(tuner.taken) == (3 + 3) * len(es.TUNE_TEXTS), "one round each"


# --- calls ---


def test_calls_are_full_batches_in_all_workers_with_their_threads(bench: Bench) -> None:
    tuner = bench.real(cores=2)
    tuner.run(256)
    assert all(rate > 0 for stage in tuner._stages for rate in stage.values())
    batches = {tuple(map(len, batch)) for batch in bench.engine.calls}
    # The fake engine reads 32 tokens an input and 64 a call.
    assert batches == {(24, 24), (32, 32)}
    assert set(bench.engine.threads) == {1, 2}
    assert bench.engine.contexts_open == 0


def test_rates_of_workers_add_up(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(10**6))
    monkeypatch.setattr(
        es, "time", types.SimpleNamespace(monotonic=lambda: float(next(ticks)))
    )
    # One call: it begins, is found to be over at the next tick, timed at the one after.
    tuner = bench.real(cores=1)
    tuner._contexts.append(bench.engine.new_context())
    rate = tuner._measure(es.Layout(1, 1, 256), 24, 0.0)
    assert rate == 2 / 2, "inputs in one call, by seconds"


def test_a_call_that_fails_while_measuring_ends_it_with_its_reason(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    died: list[Any] = []
    monkeypatch.setattr("threading.excepthook", died.append)

    def embed(self: Context, inputs: Sequence[Any], **_: Any) -> Any:
        if len(inputs) > 1:
            raise es.EngineError("llama.cpp returned -2")
        return kit.FakeContext.embed(self, inputs)

    monkeypatch.setattr(Context, "embed", embed)
    with pytest.raises(es.EngineError, match="returned -2"):
        bench.real().run(256)
    assert not died
    assert bench.engine.contexts_open == 0


# --- nothing stays open ---


def test_contexts_are_closed_when_measuring_fails(bench: Bench) -> None:
    tuner = bench.tuner()

    def fail(_: float) -> None:
        raise KeyboardInterrupt

    tuner.on_measure = fail
    with pytest.raises(KeyboardInterrupt):
        tuner.run(256)
    assert bench.engine.contexts_open == 0


@pytest.mark.parametrize("contexts", [0, 1, 3])
def test_contexts_are_closed_when_there_is_no_room_for_another(
    bench: Bench, contexts: int
) -> None:
    bench.engine.contexts_left = contexts
    with pytest.raises(es.StartupError, match="no room"):
        bench.tuner().run(256)
    assert bench.engine.contexts_open == 0


# --- the profile ---

FILE_NAMES = st.text(
    st.characters(exclude_characters="/\0", exclude_categories=["Cs"]),
    min_size=1,
    max_size=50,
).filter(lambda name: name.strip("."))
LAYOUTS = st.builds(
    es.Layout,
    st.integers(1, 1024),
    st.integers(1, 1024),
    st.integers(16, 1 << 16),
)


def loaded(profile: str, folder: Path) -> es.LoadedSettings:
    """What a server makes of it with --config."""
    path = folder / "x.tune.toml"
    path.write_text(profile, encoding="utf-8")
    return es.load_settings({"config": str(path)}, {})


@given(LAYOUTS, FILE_NAMES)
def test_a_profile_is_a_configuration_that_says_what_was_found(
    best: es.Layout, name: str
) -> None:
    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp) / "models"
        folder.mkdir()
        model = folder / name
        model.write_bytes(es.GGUF_MAGIC)
        given = {"model_path": str(model), "weights": "auto"}
        profile = es.tune_profile(best, given)
        found = loaded(profile, Path(temp))
    settings = found.settings
    assert settings.model_path == str(model)
    assert best == es.Layout(settings.workers, settings.threads, settings.batch_tokens)
    assert settings.weights == "auto"
    said = {n for n, source in found.sources.items() if source.startswith("file ")}
    names = {"model_path", "weights", "workers", "threads", "batch_tokens"}
    assert said == names, "and nothing else is said"


def test_a_profile_of_the_default_model_names_no_file(tmp_path: Path) -> None:
    profile = es.tune_profile(BASE, {})
    assert profile.startswith(es.TUNE_MARK)
    assert es.cpu_name() in profile.splitlines()[0]
    assert loaded(profile, tmp_path).sources["model_path"] == "default"


# --- the command line ---


@dataclass
class Desk:
    """`tune` in this process, without a model and in no time."""

    root: Path
    capsys: pytest.CaptureFixture[str]
    out: str = ""
    err: str = ""

    @property
    def profile(self) -> Path:
        return self.root / "x.tune.toml"

    def tune(self, *flags: str) -> int:
        """The exit code; sets out and err."""
        model = self.root / "fake.gguf"
        model.write_bytes(es.GGUF_MAGIC)  # no weights after it: see Engine
        given = ["tune", "--model-path", str(model), "--output", str(self.profile)]
        given += ["--cache-dir", str(self.root / "cache"), *flags]
        try:
            code = es.main(given, engine_factory=Engine)
        except SystemExit as end:
            code = int(str(end.code))
        self.out, self.err = self.capsys.readouterr()
        return code

    def sentence(self) -> str:
        """What was said, which is one line on stderr and nothing else."""
        assert self.out == ""
        assert self.err.startswith("embellama_server: ")
        assert self.err.endswith("\n")
        assert self.err[:-1].isprintable(), self.err
        return self.err


MEASURED: list[str] = []  # weights, by the last test that had a desk


@pytest.fixture
def desk(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Desk:
    def measure(own: es.Tuner, layout: es.Layout, tokens: int, _: float) -> float:
        MEASURED.append(own.engine.card.weights)
        return (2.0 if layout.threads == 2 else 1.0) * 1000 / tokens

    def compare(_: es.Engine, other: es.Engine) -> es.Finding:
        return es.Finding(2.0 if other.card.weights == "bf16" else 1.0, cosine=1.0)

    MEASURED.clear()
    monkeypatch.setattr(es.Tuner, "_measure", measure)
    monkeypatch.setattr(es, "compare", compare)
    monkeypatch.setattr(es, "usable_cores", lambda: 2)
    for variable in [v for v in os.environ if v.startswith("EMBELLAMA_")]:
        monkeypatch.delenv(variable)
    return Desk(tmp_path, capsys)


def test_tune_prints_a_table_and_where_the_profile_is(desk: Desk) -> None:
    assert desk.tune("--log-level", "error") == 0
    *table, empty, last = desk.out.splitlines()
    assert empty == ""
    assert all(line.startswith("|") for line in table)
    assert [line for line in table if line.endswith(" best |")]
    command = f"python embellama_server.py --config {desk.profile}"
    assert last == f"written to {desk.profile}: {command}"
    assert desk.err == "", "no progress where nobody watches"
    found = es.load_settings({"config": str(desk.profile)}, {}).settings
    assert found.model_path == str(desk.root / "fake.gguf")
    assert (found.weights, found.workers, found.threads) == ("auto", 1, 2)
    assert set(MEASURED) == {"bf16"}, "what auto decides on"
    assert sorted(p.name for p in desk.root.iterdir()) == [
        *("cache", "fake.gguf", "x.tune.toml"),
    ]


def test_tune_writes_beside_where_it_was_started_unless_told(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(desk.root)
    assert desk.tune("--output", "") == 0
    assert "written to fake.tune.toml: " in desk.out
    assert (desk.root / "fake.tune.toml").read_text().startswith(es.TUNE_MARK)


def test_a_terminal_is_shown_the_progress(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert desk.tune("--log-level", "error") == 0
    first, *lines = terminal.getvalue().split("\r\x1b[K")
    assert first == ""
    bars = [line[1:21] for line in lines]
    assert {bar.count("#") + bar.count(".") for bar in bars} == {20}
    filled = [line.count("#") for line in lines]
    assert filled == sorted(filled)
    assert (filled[0], filled[-1]) == (0, 20)
    assert terminal.getvalue().endswith("\n")
    assert terminal.getvalue().count("\n") == 1


@pytest.mark.parametrize(
    "seconds",
    ["0", "0.9", "86400.5", "100000", "-1", "nan", "inf", "1e3", "", "\u0661"],
)
def test_seconds_out_of_bounds_are_exit_2(desk: Desk, seconds: str) -> None:
    assert desk.tune(f"--seconds={seconds}") == 2
    said = desk.sentence()
    assert "--seconds" in said
    assert "1 to 86400" in said
    assert not MEASURED


@pytest.mark.parametrize("flag", ["--batch-tokens=7", "--prot=1", "--print-config"])
def test_wrong_settings_are_exit_2_for_tune_too(desk: Desk, flag: str) -> None:
    assert desk.tune(flag) == 2
    assert flag.partition("=")[0].lstrip("-").replace("-", "_") in (
        desk.sentence().replace("-", "_")
    )


@pytest.mark.parametrize("content", [b"port = 1\n", b"", b"\xff", b" # measured by"])
def test_a_file_that_tune_did_not_write_is_not_overwritten(
    desk: Desk, content: bytes
) -> None:
    desk.profile.write_bytes(content)
    assert desk.tune() == 1
    said = desk.sentence()
    assert str(desk.profile) in said
    assert "--output" in said
    assert desk.profile.read_bytes() == content
    assert not MEASURED, "it is said before anything is measured"


def test_a_folder_is_not_overwritten_either(desk: Desk) -> None:
    desk.profile.mkdir()
    assert desk.tune() == 1
    assert str(desk.profile) in desk.sentence()


def test_a_profile_is_written_anew(desk: Desk) -> None:
    assert desk.tune() == 0
    first = desk.profile.read_text()
    desk.profile.write_text(first + "port = 1\n")
    assert desk.tune() == 0
    assert desk.profile.read_text() == first


def test_a_profile_without_a_folder_is_said_before_anything_is_measured(
    desk: Desk,
) -> None:
    nowhere = desk.root / "none/x.toml"
    assert desk.tune("--output", str(nowhere), "--log-level", "error") == 1
    assert str(nowhere.parent) in desk.sentence()
    assert not MEASURED


def test_several_models_are_not_tuned_at_once(desk: Desk) -> None:
    # Which of them? And what a profile says would be said of all.
    other = desk.root / "other.gguf"
    other.write_bytes(es.GGUF_MAGIC)
    assert desk.tune("--model-path", f"other={other}") == 1
    assert "--model-path" in desk.err
    assert not desk.profile.exists()


def test_a_model_that_does_not_load_is_exit_1(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise es.StartupError("llama.cpp cannot load it: bad magic")

    monkeypatch.setattr(Engine, "__init__", broken)
    assert desk.tune() == 1
    assert "bad magic" in desk.sentence()
    assert not desk.profile.exists()


def test_a_model_that_generates_has_no_layout_to_tune(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = kit.fake_card(kind="generate")
    always = property(lambda _: card, lambda *_: None)
    monkeypatch.setattr(Engine, "card", always, raising=False)
    assert desk.tune() == 1
    assert "this model generates" in desk.sentence()
    assert not desk.profile.exists()


def test_without_room_for_other_weights_the_files_own_are_tuned(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = types.SimpleNamespace(free=0)
    monkeypatch.setattr("shutil.disk_usage", lambda _: room)
    assert desk.tune() == 0
    assert set(MEASURED) == {"f16"}


def test_weights_that_cannot_compute_leave_the_files_own(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compare(*_: es.Engine) -> es.Finding:
        raise es.EngineError("llama.cpp returned -2")

    monkeypatch.setattr(es, "compare", compare)
    assert desk.tune() == 0
    assert set(MEASURED) == {"f16"}
    assert "returned -2" in desk.err
    assert "Traceback" not in desk.err


def test_weights_that_were_named_are_tuned_and_kept_in_the_profile(desk: Desk) -> None:
    assert desk.tune("--weights", "keep") == 0
    assert set(MEASURED) == {"f16"}
    found = es.load_settings({"config": str(desk.profile)}, {})
    assert found.settings.weights == "keep"


@pytest.mark.parametrize(
    ("error", "code"),
    [(None, 0), (es.EngineError("boom"), 1), (es.StartupError("no room"), 1)],
    ids=str,
)
def test_the_engine_is_closed_at_the_end(
    desk: Desk,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception | None,
    code: int,
) -> None:
    made: list[Engine] = []
    init = Engine.__init__

    def remembered(self: Engine, *given: Any) -> None:
        init(self, *given)
        made.append(self)

    def fail(*_: Any) -> float:
        assert error is not None
        raise error

    monkeypatch.setattr(Engine, "__init__", remembered)
    if error is not None:
        monkeypatch.setattr(es.Tuner, "_measure", fail)
    assert desk.tune() == code
    assert made
    assert all(engine.is_closed and not engine.contexts_open for engine in made)


@pytest.mark.parametrize(("flags", "most"), [((), 512), (("4096",), 4096)])
def test_calls_can_be_as_long_as_each_layout_that_is_measured(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], most: int
) -> None:
    made: list[int] = []
    init = Engine.__init__

    def remembered(self: Engine, *given: Any) -> None:
        init(self, *given)
        made.append(given[1].batch_tokens)

    monkeypatch.setattr(Engine, "__init__", remembered)
    assert desk.tune(*(f"--batch-tokens={n}" for n in flags)) == 0
    assert set(made) == {most}


def test_an_interrupted_verb_is_one_line_and_exit_130(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(es.Tuner, "_measure", interrupt)
    assert desk.tune("--log-level", "error") == 130
    assert desk.sentence() == "embellama_server: interrupted\n"
    assert not desk.profile.exists()


def test_help_of_tune_names_its_flags(desk: Desk) -> None:
    assert desk.tune("--help") == 0
    for part in ("--seconds", "--output", "--model-path", "embellama_server.py tune"):
        assert part in desk.out


# --- verbs ---


@pytest.mark.parametrize("flags", [["--version"], ["--print-config", "--port", "1"]])
def test_serve_is_what_happens_without_a_verb(
    capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    assert es.main(flags) == 0
    plain = capsys.readouterr()
    assert es.main(["serve", *flags]) == 0
    assert capsys.readouterr() == plain


@pytest.mark.parametrize(
    "given",
    [
        ["bench"],
        [""],
        ["Serve"],
        ["serve", "tune"],
        ["tune", "serve"],
        ["--gpu", "tune"],
        ["openapi", "--port=1"],
    ],
)
def test_an_unknown_verb_is_exit_2_and_one_line(
    capsys: pytest.CaptureFixture[str], given: list[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        es.main(given)
    assert end.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1
    assert shown.err.startswith("embellama_server: unrecognized arguments: ")


@pytest.mark.parametrize("name", es.VERBS)
def test_every_verb_explains_itself(
    capsys: pytest.CaptureFixture[str], name: str
) -> None:
    with pytest.raises(SystemExit) as end:
        es.main([name, "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert " ".join(es.VERBS[name].help.split()) in " ".join(out.split())
    assert all(flag in out for flag in es.VERBS[name].flags)


def test_a_bug_in_a_verb_is_a_traceback_a_sentence_and_exit_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(es, "openapi_text", lambda: 1 / 0)
    assert es.main(["openapi"]) == 1
    err = capsys.readouterr().err
    assert "ZeroDivisionError" in err
    assert err.splitlines()[-1] == (
        "embellama_server: the above is a bug, please report it"
    )


# --- all of it ---


@pytest.mark.heavy
@pytest.mark.model
def test_a_server_starts_with_the_profile_of_its_box(
    default_model: Path, tmp_path: Path
) -> None:
    profile, cache = tmp_path / "box.toml", str(tmp_path / "cache")
    flags = ["--model-path", str(default_model), "--cache-dir", cache]
    command = [sys.executable, SCRIPT, "tune", *flags, "--output", str(profile)]
    done = subprocess.run(
        [*command, "--seconds", "2", "--log-level", "error"],
        capture_output=True,
        text=True,
        timeout=kit.DEADLINE_S * 2,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].startswith(f"written to {profile}: ")
    started = ("--config", str(profile), "--cache-dir", cache)
    with kit.started(*started, module=(SCRIPT,)) as server:
        reply = post(server.url, {"input": ["hello", "world"]})
        assert isinstance(reply, dict)
        assert [len(item["embedding"]) for item in reply["data"]] == [384, 384]
        assert server.stop() == 0
        assert not [line for line in server.log if "weights tried" in line]
