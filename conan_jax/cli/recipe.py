"""A whole recipe: prepare the data, train the stages in order, evaluate after each, write the report."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from conan_jax import config, config_io, distributed
from conan_jax.errors import ConfigError
from conan_jax.files import read_json, remove_inside, write_json
from conan_jax.folder_lock import FolderLock

FREE_KEYS = {"log_every", "checkpoint_every", "keep_checkpoints"}  # may change between a run and its resumption
BASELINES = {False: "untrained", True: "initial"}  # the folder of the model before its first step, by whether `init_from` names weights
RESULTS_OF_THE_LAST_STAGE = ("summary.json", "report.html", "searches.json")


class Recipe:
    """One run in one folder: what `conan train`, `conan prepare` and `conan demo` do. Process 0 alone prepares, evaluates and writes."""

    def __init__(self, run: config.Run, console: Console) -> None:
        from conan_jax.model import Embedder

        self.run, self.console = run, console
        self.folder = Path(run.output_dir)
        self.embedder = Embedder(run.model)
        self._prepared: Any = None
        self._evaluations: tuple[config.Evaluation, ...] | None = None

    def prepare(self, stages: Sequence[config.AnyStage] | None = None, forgotten: Sequence[config.AnyStage] = ()) -> Any:
        """Build what is missing of the datasets, tokenizer and packed rows of `stages` (default: all), and write `prepared.json`.

        Data that begun stages were trained with must be the same now; `forgotten` ones are not asked.
        """
        from conan_jax.data.prepare import prepare

        if self._prepared is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            names = None if stages is None else [stage.name for stage in stages]
            begun = [stage.name for stage in self._begun(self.run.stages) if stage not in forgotten]
            with self._timed("prepare"):
                self._prepared = prepare(self.run, stages=names, begun=begun, console=self.console)
        return self._prepared

    def _begun(self, stages: Sequence[config.AnyStage]) -> list[config.AnyStage]:
        """Those of `stages` that have checkpoints."""
        from conan_jax.train.checkpoint import latest_step

        return [stage for stage in stages if latest_step(self.folder / stage.name) is not None]

    def train(self, peers: distributed.Peers, only: Sequence[str] = (), from_stage: str | None = None, fresh: bool = False,
              fallback: bool = False) -> dict[str, Any] | None:
        """Train the stages that `select_stages` gives, evaluate each when it ends, and return the summary (None off process 0).

        Stages that are complete are not trained again, an interrupted one goes on from its last checkpoint. `fresh` forgets the
        stages to train and those after them, which descend from them. `fallback` sets damaged checkpoints aside for older ones.
        """
        stages = select_stages(self.run, only, from_stage)
        peers.alone("prepare", lambda: self._begin(stages, fresh, peers.count, named=bool(only or from_stage)))
        for index, stage in enumerate(stages):
            self._train_stage(stage, stages[index + 1 :], peers, fallback)
        return peers.alone("summarise", self.summarise)

    def _begin(self, stages: Sequence[config.AnyStage], fresh: bool, processes: int, named: bool = False) -> None:
        """All that comes before the first stage. Everything that can be refused is refused before anything is removed or trained."""
        from conan_jax.eval.results import data_sha256

        self._refuse_unfit_devices(stages, processes)
        forgotten = self.run.stages[self.run.stages.index(stages[0]) :] if fresh else ()
        if not fresh:
            self._refuse_changed_recipe(stages)
            self._refuse_stages_trained_before(stages)
        self._refuse_missing_start(stages[0])
        self._refuse_unread_start(stages[0], fresh)
        if not named:
            self._refuse_repeated_stages(stages[0], fresh)
        if fresh and len(forgotten) == len(self.run.stages):
            (self.folder / "timings.json").unlink(missing_ok=True)
        self._refuse_unfit_start(stages[0], self.prepare(stages, forgotten).tokenizer.sha256)
        for evaluation in self.evaluations:
            data_sha256(evaluation)  # a set that is missing is known before anything is removed
        self._forget(forgotten)
        write_json(self.folder / "config.json", config_io.to_dict(self.run))
        self._evaluate_baselines()
        for stage in self.run.stages:
            if stage not in stages:  # its scores are shown beside those of the stages that are trained
                self._evaluate_stage(stage)

    def _refuse_unfit_devices(self, stages: Sequence[config.AnyStage], processes: int) -> None:
        """A mesh or a batch that does not fit is known before hours go into the data."""
        from conan_jax.launch.estimates import batches
        from conan_jax.sharding import make_mesh

        make_mesh(self.run.mesh)
        for stage in stages:
            for key, rows in batches(stage).items():
                if rows % processes:
                    raise ConfigError(f"{key}: {rows} rows cannot be split over {processes} processes; "
                                      f"use a multiple, say --set {key}={-(-rows // processes) * processes}")

    def _forget(self, stages: Sequence[config.AnyStage]) -> None:
        """Remove what was trained in `stages`, the last first, and everything that was made of it.

        What is forgotten from the first stage on takes the baselines and the times with it.
        """
        if not stages:
            return
        names = [stage.name for stage in stages]
        whole = len(stages) == len(self.run.stages)
        if whole:  # stages that an earlier recipe of this folder had are no part of the new one
            before = read_json(self.folder / "config.json")
            names += [stage.name for stage in config_io.from_dict(before).stages if stage.name not in names] if before else []
        begun = [name for name in names if (self.folder / name).is_dir()]
        for file in RESULTS_OF_THE_LAST_STAGE:
            (self.folder / file).unlink(missing_ok=True)
        for name in ("index", *reversed(begun), *([*BASELINES.values(), "bm25"] if whole else [])):
            remove_inside(self.folder / name, self.folder)
        if not whole:
            timings = read_json(self.folder / "timings.json", {})
            gone = {*names, *(f"evaluate/{name}" for name in names)}
            write_json(self.folder / "timings.json", {phase: seconds for phase, seconds in timings.items() if phase not in gone})
        if begun:
            self.console.print(f"forgotten: {', '.join(begun)}", highlight=False)

    def _has_steps(self, stage_config: config.AnyStage) -> bool:
        from conan_jax.train.checkpoint import latest_step

        return latest_step(self.folder / stage_config.name) is not None

    def _refuse_missing_start(self, stage_config: config.AnyStage) -> None:
        """A later stage alone needs the weights of the one before it; from scratch it would be another recipe."""
        previous = self._previous(stage_config)
        if previous is None or self.run.init_from is not None:
            return
        if not self._has_steps(previous) and not self._has_steps(stage_config):
            raise ConfigError(f"stage {stage_config.name!r} starts from stage {previous.name!r}, which has no checkpoint in {self.folder}; "
                              "train that first, name weights to start from with --init-from, or drop it from the recipe's stages")

    def _refuse_unread_start(self, stage_config: config.AnyStage, fresh: bool) -> None:
        """Weights named by `init_from` that no stage to train would start from, because the stage before has weights."""
        previous, place = self._previous(stage_config), self.run.init_from
        begun = self._has_steps(stage_config) and not fresh
        if place is None or previous is None or begun or not self._has_steps(previous) or place == recorded_init_from(self.folder):
            return
        raise ConfigError(f"stage {stage_config.name!r} starts from stage {previous.name!r} of {self.folder}, so init_from={place} would "
                          "not be read; leave it out, or give the run a name of its own (--set name=...)")

    def _refuse_stages_trained_before(self, stages: Sequence[config.AnyStage]) -> None:
        """A stage that would be trained after stages that must descend from it."""
        for stage in stages:
            later = self.run.stages[self.run.stages.index(stage) + 1 :]
            trained = [other.name for other in later if self._has_steps(other)]
            if trained and not self._has_steps(stage):
                raise ConfigError(f"{self.folder} holds stage {', '.join(trained)} without stage {stage.name!r}, which comes before; train "
                                  f"all of them anew with --fresh --from-stage {stage.name}, or only what follows with --from-stage "
                                  f"{trained[-1]}")

    def _refuse_repeated_stages(self, first: config.AnyStage, fresh: bool) -> None:
        """Weights that are the result of a later stage of this recipe: the stages up to it are trained again only when they are named."""
        from conan_jax.train import checkpoint, start_rule

        place = self._init_from()
        if place is None or (self._has_steps(first) and not fresh):
            return
        metadata = checkpoint.read_metadata(*start_rule.locate(place))
        source = config_io.from_dict(metadata["config"]).stage(metadata["stage"])
        kinds = [stage.kind for stage in self.run.stages]
        if source.kind not in kinds[1:] or kinds[0] == source.kind:
            return
        done = kinds.index(source.kind)
        again = ", ".join(stage.name for stage in self.run.stages[: done + 1])
        after = self.run.stages[done + 1 :]
        go_on = f"go on after it with --from-stage {after[0].name}, or " if after else ""
        raise ConfigError(f"{place} is trained up to a stage of kind {source.kind!r}, and this recipe would train {again} again on its "
                          f"weights; {go_on}name the first stage to do so: --from-stage {first.name}")

    def _refuse_unfit_start(self, stage_config: config.AnyStage, tokenizer_sha256: str) -> None:
        """Weights of another tokenizer or model, which the first stage would refuse."""
        from conan_jax.train.start_rule import refuse_unfit

        refuse_unfit(self._previous_folder(stage_config), self.run.model, tokenizer_sha256, self._init_from())

    def _train_stage(
        self, stage_config: config.AnyStage, later: Sequence[config.AnyStage], peers: distributed.Peers, fallback: bool,
    ) -> None:
        from conan_jax.data.pipeline import Pipeline
        from conan_jax.stages import make_stage
        from conan_jax.train.loop import train_stage

        prepared = self._load_prepared()
        with self._timed(stage_config.name) if peers.index == 0 else contextlib.nullcontext():
            train_stage(
                self.run,
                stage_config,
                stage=make_stage(stage_config, self.embedder),
                embedder=self.embedder,
                pipeline=Pipeline(self.run, stage_config, prepared.tokenizer, prepared=prepared, host_index=peers.index,
                                  host_count=peers.count),
                tokenizer_sha256=prepared.tokenizer.sha256,
                folder=self.folder / stage_config.name,
                previous_folder=self._previous_folder(stage_config),
                init_from=self._init_from(),
                console=self.console,
                fallback=fallback,
                later_steps=sum(self._update_flops(stage) * stage.steps for stage in later) / self._update_flops(stage_config),
            )
        peers.alone(f"evaluate-{stage_config.name}", lambda: self._evaluate_stage(stage_config))

    def _update_flops(self, stage_config: config.AnyStage) -> float:
        """About the FLOPs of one update, padding included: what the time left of a recipe is estimated by."""
        from conan_jax.data.shapes import token_slots
        from conan_jax.launch.estimates import parameters
        from conan_jax.train.metrics import flops_per_token

        body = parameters(self.run.model) - self.run.model.vocab_size * self.run.model.hidden_size
        return token_slots(stage_config) * flops_per_token(self.run.model, stage_config, body)

    def _load_prepared(self) -> Any:
        """The prepared data, which process 0 alone prepared and recorded for the others."""
        from conan_jax.data.prepared import Prepared

        if self._prepared is None:
            self._prepared = Prepared.load(self.run)
        return self._prepared

    def _evaluate_stage(self, stage_config: config.AnyStage) -> None:
        """Score a stage that is complete on the sets that its newest checkpoint has no valid score of."""
        from conan_jax.inference.encoder import Encoder
        from conan_jax.train import checkpoint

        folder = self.folder / stage_config.name
        step = checkpoint.latest_step(folder)
        if step is not None and step >= stage_config.steps:
            identity = {"stage": stage_config.name, **checkpoint.identity(folder, step)}
            self._evaluate(stage_config.name, identity, lambda: Encoder.load(folder))

    def _init_from(self) -> str | None:
        from conan_jax.data.locations import expand_variables

        return None if self.run.init_from is None else expand_variables(self.run.init_from)

    def _previous(self, stage_config: config.AnyStage) -> config.AnyStage | None:
        index = self.run.stages.index(stage_config)
        return self.run.stages[index - 1] if index else None

    def _previous_folder(self, stage_config: config.AnyStage) -> Path | None:
        previous = self._previous(stage_config)
        return None if previous is None else self.folder / previous.name

    @property
    def evaluations(self) -> tuple[config.Evaluation, ...]:
        """The evaluation sets with their real paths."""
        from conan_jax.data.locations import resolve

        if self._evaluations is None:
            self._evaluations = tuple(
                dataclasses.replace(e, path=resolve(self.run, e.path), train_path=resolve(self.run, e.train_path) if e.train_path else None)
                for e in self.run.evaluations
            )
        return self._evaluations

    @property
    def baseline(self) -> str:
        """The folder and the name of the model before its first step."""
        return BASELINES[self.run.init_from is not None]

    def _initial_encoder(self) -> Any:
        """The model before its first step: random weights, or those that `init_from` names."""
        from conan_jax.inference.encoder import Encoder
        from conan_jax.inference.load import untrained
        from conan_jax.train import checkpoint, start_rule

        loaded, place = untrained(self.run, self.prepare().tokenizer), self._init_from()
        if place is not None:
            folder, step = start_rule.locate(place)
            loaded = loaded._replace(params=checkpoint.restore_params(folder, step), identity={**loaded.identity, "init_from": place})
        return Encoder(*loaded)

    def _initial_identity(self) -> dict[str, Any]:
        """All that the scores of `_initial_encoder` follow from."""
        from conan_jax.inference.prompts import prompts_of
        from conan_jax.train import checkpoint, start_rule

        place, model, first = self._init_from(), config_io.to_dict(self.run.model), config_io.to_dict(self.run.stages[0])
        weights = {"seed": self.run.seed} if place is None else checkpoint.identity(*start_rule.locate(place))
        return {"stage": self.baseline, "model": model, "first_stage": first, "tokenizer_sha256": self.prepare().tokenizer.sha256,
                "prompts": prompts_of(self.run), **weights}

    def _evaluate_baselines(self) -> None:
        """Score the model before its first step, and BM25 on the retrieval sets."""
        from conan_jax.eval import evaluate_bm25, stored

        for name in set(BASELINES.values()) - {self.baseline}:  # of an earlier version, or of another start
            remove_inside(self.folder / name, self.folder)
        if self.evaluations:
            self._evaluate(self.baseline, self._initial_identity(), self._initial_encoder)
        retrieval = [e for e in self.evaluations if e.kind == "retrieval"]
        with self._timed("evaluate/bm25"):
            stored.update(self.folder / "bm25", retrieval, {"method": "bm25"}, lambda: lambda e: ({"figures": evaluate_bm25(e)}, None))

    def _evaluate(self, who: str, identity: dict[str, Any], load: Callable[[], Any]) -> None:
        """Bring the scores in the folder `who` up to date; `load` gives the encoder where one is needed."""
        from conan_jax.eval import stored
        from conan_jax.eval.dimensions import dimensions_of_run
        from conan_jax.eval.results import score_set

        folder, dimensions = self.folder / who, dimensions_of_run(self.run)

        def scorer() -> stored.Score:
            encoder = load()

            def score(evaluation: config.Evaluation) -> Any:
                with self.console.status(f"evaluating {who} on {evaluation.name}"):
                    # The report shows the vectors of the main set and of sets in several languages.
                    return score_set(encoder, evaluation, dimensions,
                                     diagnosed=lambda figures: evaluation.main or any("/" in name for name in figures))

            return score

        with self._timed(f"evaluate/{who}"):
            scored = stored.update(folder, self.evaluations, identity, scorer)
        if scored:
            figures = read_json(folder / stored.FIGURES)
            label = f"initial weights ({self.run.init_from})" if who == BASELINES[True] else who
            text = "  ".join(headline(e, figures[e.name]) for e in self.evaluations)
            self.console.print(f"[bold]{escape(label)}[/bold] {escape(text)}", highlight=False, soft_wrap=True)

    def summarise(self) -> dict[str, Any]:
        """Write and return `summary.json`: the main metrics of the main set by stage, everything else beneath.

        The main set is the evaluation that is marked so, or the first. Of a retrieval set nDCG@10 and recall@10 are shown, of any
        other kind its main metric; `main` names the set and the metric.
        """
        from conan_jax.eval import MAIN_FIGURES
        from conan_jax.model import num_params

        rows = [self.baseline, "bm25", *(s.name for s in self.run.stages)]
        results = {row: read_json(self.folder / row / "evaluation.json", {}) for row in rows}
        main = next((e for e in self.run.evaluations if e.main), next(iter(self.run.evaluations), None))
        metrics = ("ndcg@10", "recall@10") if main is None or main.kind == "retrieval" else (MAIN_FIGURES[main.kind],)
        summary: dict[str, Any] = {}
        for metric in metrics:
            shown = {row: figures.get(main.name, {}) for row, figures in results.items()} if main is not None else {}
            summary[metric] = {row: figures[metric] for row, figures in shown.items() if metric in figures}
        summary["main"] = None if main is None else {"evaluation": main.name, "metric": metrics[0]}
        timings: dict[str, float] = {}
        for phase, seconds in read_json(self.folder / "timings.json", {}).items():
            phase = phase.partition("/")[0]
            timings[phase] = round(timings.get(phase, 0.0) + seconds, 2)
        summary |= {
            "seconds": round(sum(timings.values()), 1),
            "parameters": num_params(self.run.model),
            "timings": timings,
            "evaluations": results,
        }
        write_json(self.folder / "summary.json", summary)
        return summary

    @contextlib.contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        """Add the wall time of the block to `timings.json`, so that a resumed run still knows what it cost.

        The phases are `prepare`, the names of stages, and `evaluate/ROW` of each row of results.
        """
        began, done = time.perf_counter(), False
        try:
            yield
            done = True
        finally:
            if done or any(path.is_file() for path in self.folder.rglob("[!.]*")):  # a command that only failed leaves no folder behind
                timings = read_json(self.folder / "timings.json", {})
                timings[phase] = round(timings.get(phase, 0.0) + time.perf_counter() - began, 2)
                write_json(self.folder / "timings.json", timings)

    def _refuse_changed_recipe(self, stages: Sequence[config.AnyStage]) -> None:
        """A stage that has checkpoints goes on only under the configuration they were made with."""
        before = read_json(self.folder / "config.json")
        if before is None:
            return
        old, new = config_io.flatten(config_io.from_dict(before)), config_io.flatten(self.run)
        begun = [stage.name for stage in self._begun(stages)]
        prefixes = ("model.", "tokenizer.", "datasets.", "seed", "init_from", *(f"{name}." for name in begun))
        changed = [
            key for key in sorted(old.keys() | new.keys())
            if begun and key.startswith(prefixes) and key.rsplit(".", 1)[-1] not in FREE_KEYS and old.get(key) != new.get(key)
        ]
        if changed:
            shown = ", ".join(f"{key} ({old.get(key)!r} -> {new.get(key)!r})" for key in changed[:5])
            raise ConfigError(
                f"{self.folder} holds a run with another configuration: {shown}{' ...' if len(changed) > 5 else ''}. "
                "Give the new one a name of its own (--set name=...), or train it anew with --fresh."
            )


def select_stages(run: config.Run, only: Sequence[str] = (), from_stage: str | None = None) -> list[config.AnyStage]:
    """The stages to train, in the order of the recipe: those called `only`, or `from_stage` and all after it, by default all.

    Raises `ConfigError` for a name that is not known, for both at once, and for a gap: a stage starts from the one before it.
    """
    if not run.stages:
        raise ConfigError(f"run {run.name!r} has no stages, so there is nothing to train; give the recipe at least one")
    if only and from_stage is not None:
        raise ConfigError("give either --stage or --from-stage: --stage names each stage to train, --from-stage the first of them")
    if from_stage is not None:
        return list(run.stages[run.stages.index(run.stage(from_stage)) :])
    chosen = [run.stage(name) for name in only]
    places = sorted({run.stages.index(stage) for stage in chosen}) or range(len(run.stages))
    for place, following in zip(places, places[1:]):
        if following != place + 1:
            left_out = ", ".join(stage.name for stage in run.stages[place + 1 : following])
            raise ConfigError(f"--stage {run.stages[place].name} --stage {run.stages[following].name} leaves out {left_out}, which "
                              f"{run.stages[following].name} starts from; name every stage between, or give one command for each part")
    return [run.stages[place] for place in places]


def recorded_init_from(folder: Path) -> str | None:
    """The weights that the run in `folder` was started from, as its config.json records them."""
    return read_json(folder / "config.json", {}).get("init_from")


def continued(run: config.Run, forget_all: bool = False) -> tuple[config.Run, str]:
    """`run` with the `init_from`, the model and the tokenizer that its folder records when `run` names no weights, and a line about it.

    A run that has checkpoints keeps the start that it was given at first. `forget_all`: all of them are to be forgotten. Every process
    of a run calls it alike, before any of them writes.
    """
    folder = Path(run.output_dir)
    place = recorded_init_from(folder)
    if run.init_from is not None or place is None:
        return run, ""
    if forget_all or not any((folder / stage.name / "checkpoints").is_dir() for stage in run.stages):
        return run, f"init_from: {folder} was started from {place}; this command names no weights, so it starts from random ones"
    recorded = config_io.from_dict(read_json(folder / "config.json"))
    return (config_io.with_start(run, place, recorded.model, recorded.tokenizer),
            f"init_from: {place}, with its model and tokenizer, as {folder / 'config.json'} records")


@contextlib.contextmanager
def together(run: config.Run, *, on_stderr: bool = False) -> Iterator[tuple[Recipe, distributed.Peers]]:
    """A recipe and the processes that run it, met in its folder and alone in it; the consoles of all but process 0 are silent."""
    distributed.initialise()
    with distributed.Peers(Path(run.output_dir)) as peers, contextlib.ExitStack() as stack:
        console = Console(stderr=on_stderr, quiet=peers.index > 0)
        console.print(peers, highlight=False)

        def open_folder() -> None:
            stack.enter_context(FolderLock(run.output_dir, "a training run"))
            peers.forget_earlier()

        peers.alone("open", open_folder)
        yield Recipe(run, console), peers


def headline(evaluation: config.Evaluation, figures: dict[str, float]) -> str:
    """A set and the one figure people quote for its kind."""
    from conan_jax.eval import MAIN_FIGURES

    main = MAIN_FIGURES[evaluation.kind]
    return f"{evaluation.name} {main} {figures[main]:.3f}"
