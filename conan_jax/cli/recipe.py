"""A whole recipe: prepare the data, train the stages in order, evaluate after each, write the report."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from conan_jax import config, config_io, distributed
from conan_jax.errors import ConfigError
from conan_jax.files import read_json, write_json
from conan_jax.folder_lock import FolderLock

FREE_KEYS = {"log_every", "checkpoint_every", "keep_checkpoints"}  # may change between a run and its resumption


class Recipe:
    """One run in one folder: what `conan train`, `conan prepare` and `conan demo` do. Process 0 alone prepares, evaluates and writes."""

    def __init__(self, run: config.Run, console: Console) -> None:
        from conan_jax.model import Embedder

        self.run, self.console = run, console
        self.folder = Path(run.output_dir)
        self.embedder = Embedder(run.model)
        self._prepared: Any = None
        self._evaluations: tuple[config.Evaluation, ...] | None = None

    def prepare(self, stages: Sequence[config.AnyStage] | None = None) -> Any:
        """Build what is missing of the datasets, tokenizer and packed rows of `stages` (default: all), and write `prepared.json`."""
        from conan_jax.data.prepare import prepare

        if self._prepared is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            names = None if stages is None else [stage.name for stage in stages]
            begun = [stage.name for stage in self._begun(self.run.stages)]
            with self._timed("prepare"):
                self._prepared = prepare(self.run, stages=names, begun=begun, console=self.console)
        return self._prepared

    def _begun(self, stages: Sequence[config.AnyStage]) -> list[config.AnyStage]:
        """Those of `stages` that have checkpoints."""
        from conan_jax.train.checkpoint import latest_step

        return [stage for stage in stages if latest_step(self.folder / stage.name) is not None]

    def train(self, peers: distributed.Peers, only: str | None = None, fresh: bool = False,
              fallback: bool = False) -> dict[str, Any] | None:
        """Train every stage, or the one called `only`, evaluate each when it ends, and return the summary (None off process 0).

        Stages that are complete are not trained again, an interrupted one goes on from its last checkpoint. `fresh` forgets the
        stages to train and those after them, which descend from them. `fallback` sets damaged checkpoints aside for older ones.
        """
        stages = [self.run.stage(only)] if only else list(self.run.stages)
        peers.alone("prepare", lambda: self._begin(stages, fresh, peers.count))
        for stage in stages:
            self._train_stage(stage, peers, fallback)
        return peers.alone("summarise", self.summarise)

    def _begin(self, stages: list[config.AnyStage], fresh: bool, processes: int) -> None:
        """All that comes before the first stage."""
        self._refuse_unfit_devices(stages, processes)
        if fresh:
            self._forget(self.run.stages[self.run.stages.index(stages[0]):])
        self._refuse_changed_recipe(stages)
        self._refuse_missing_start(stages[0])
        self.prepare(stages)
        write_json(self.folder / "config.json", config_io.to_dict(self.run))
        self._evaluate_baselines()

    def _refuse_unfit_devices(self, stages: list[config.AnyStage], processes: int) -> None:
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
        """Remove what was trained in `stages`, and the index that the last of them made."""
        begun = [stage.name for stage in stages if (self.folder / stage.name).exists()]
        for name in [*begun, "index"]:
            shutil.rmtree(self.folder / name, ignore_errors=True)
        if begun:
            self.console.print(f"forgotten: {', '.join(begun)}", highlight=False)

    def _refuse_missing_start(self, stage_config: config.AnyStage) -> None:
        """A later stage alone needs the weights of the one before it; from scratch it would be another recipe."""
        from conan_jax.train.checkpoint import latest_step

        previous = self._previous_folder(stage_config)
        if previous is None or self.run.init_from is not None:
            return
        if latest_step(previous) is None and latest_step(self.folder / stage_config.name) is None:
            raise ConfigError(f"stage {stage_config.name!r} starts from stage {previous.name!r}, which has no checkpoint in {self.folder}; "
                              "train that first, name weights to start from with --init-from, or drop it from the recipe's stages")

    def _train_stage(self, stage_config: config.AnyStage, peers: distributed.Peers, fallback: bool) -> None:
        from conan_jax.data.pipeline import Pipeline
        from conan_jax.stages import make_stage
        from conan_jax.train.loop import train_stage

        folder = self.folder / stage_config.name
        prepared = self._load_prepared()
        with self._timed(stage_config.name) if peers.index == 0 else contextlib.nullcontext():
            result = train_stage(
                self.run,
                stage_config,
                stage=make_stage(stage_config, self.embedder),
                embedder=self.embedder,
                pipeline=Pipeline(self.run, stage_config, prepared.tokenizer, prepared=prepared, host_index=peers.index,
                                  host_count=peers.count),
                tokenizer_sha256=prepared.tokenizer.sha256,
                folder=folder,
                previous_folder=self._previous_folder(stage_config),
                init_from=self._init_from(),
                console=self.console,
                fallback=fallback,
            )
        peers.alone(f"evaluate-{stage_config.name}", lambda: self._evaluate_stage(folder, trained=result.trained_steps > 0))

    def _load_prepared(self) -> Any:
        """The prepared data, which process 0 alone prepared and recorded for the others."""
        from conan_jax.data.prepared import Prepared

        if self._prepared is None:
            self._prepared = Prepared.load(self.run)
        return self._prepared

    def _evaluate_stage(self, folder: Path, trained: bool) -> None:
        """Score what was trained, or what was never scored on these sets."""
        from conan_jax.inference.encoder import Encoder

        done = read_json(folder / "evaluation.json", {})
        if trained or set(done) != {e.name for e in self.evaluations}:
            self._evaluate(folder.name, Encoder.load(folder), folder / "evaluation.json")

    def _init_from(self) -> str | None:
        from conan_jax.data.locations import expand_variables

        return None if self.run.init_from is None else expand_variables(self.run.init_from)

    def _previous_folder(self, stage_config: config.AnyStage) -> Path | None:
        names = [s.name for s in self.run.stages]
        index = names.index(stage_config.name)
        return self.folder / names[index - 1] if index else None

    @property
    def evaluations(self) -> tuple[config.Evaluation, ...]:
        """The evaluation sets with their real paths."""
        import dataclasses

        from conan_jax.data.locations import resolve

        if self._evaluations is None:
            self._evaluations = tuple(
                dataclasses.replace(e, path=resolve(self.run, e.path), train_path=resolve(self.run, e.train_path) if e.train_path else None)
                for e in self.run.evaluations
            )
        return self._evaluations

    def _untrained(self) -> Any:
        """The model before its first step: random weights, or those that `init_from` names."""
        from conan_jax.inference.encoder import Encoder
        from conan_jax.inference.load import untrained
        from conan_jax.train import checkpoint, start_rule

        loaded, place = untrained(self.run, self.prepare().tokenizer), self._init_from()
        if place is not None:
            folder, step = start_rule.locate(place)
            loaded = loaded._replace(params=checkpoint.restore_params(folder, step), identity={**loaded.identity, "init_from": place})
        return Encoder(*loaded)

    def _evaluate_baselines(self) -> None:
        """The model before its first step, and BM25 on the retrieval sets."""
        from conan_jax.eval.retrieval import evaluate_bm25

        names = {e.name for e in self.evaluations}
        if set(read_json(self.folder / "untrained" / "evaluation.json", {})) != names:
            self._evaluate("untrained", self._untrained(), self.folder / "untrained" / "evaluation.json")
        retrieval = [e for e in self.evaluations if e.kind == "retrieval"]
        if set(read_json(self.folder / "bm25" / "evaluation.json", {})) != {e.name for e in retrieval}:
            with self._timed("evaluate"):
                write_json(self.folder / "bm25" / "evaluation.json", {e.name: evaluate_bm25(e) for e in retrieval})

    def _evaluate(self, who: str, encoder: Any, file: Path) -> None:
        from conan_jax.eval import MAIN_FIGURES, evaluate
        from conan_jax.eval.diagnostics import diagnose
        from conan_jax.eval.dimensions import dimensions_of_run
        from conan_jax.eval.memory import Remembering

        with self._timed("evaluate"):
            figures, found = {}, {}
            for evaluation in self.evaluations:
                with self.console.status(f"evaluating {who} on {evaluation.name}"):
                    remembering = Remembering(encoder)
                    figures[evaluation.name] = evaluate(remembering, evaluation)
                    if evaluation.main or any("/" in name for name in figures[evaluation.name]):  # the report shows these
                        found[evaluation.name] = diagnose(remembering, evaluation, dimensions_of_run(self.run),
                                                          MAIN_FIGURES[evaluation.kind], evaluate)
            write_json(file.with_name("diagnostics.json"), found)
            write_json(file, figures)
        if figures:
            self.console.print(f"[bold]{who}[/bold] " + "  ".join(headline(e, figures[e.name]) for e in self.evaluations), highlight=False)

    def summarise(self) -> dict[str, Any]:
        """Write and return `summary.json`: the main figures by stage, everything else beneath."""
        from conan_jax.model import num_params

        rows = ["untrained", "bm25", *(s.name for s in self.run.stages)]
        results = {row: read_json(self.folder / row / "evaluation.json", {}) for row in rows}
        main = next((e.name for e in self.run.evaluations if e.main), None)
        summary: dict[str, Any] = {}
        for metric in ("ndcg@10", "recall@10"):
            summary[metric] = {row: figures[main][metric] for row, figures in results.items() if metric in figures.get(main, {})}
        timings = read_json(self.folder / "timings.json", {})
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
        """Add the wall time of the block to `timings.json`, so that a resumed run still knows what it cost."""
        began = time.perf_counter()
        try:
            yield
        finally:
            timings = read_json(self.folder / "timings.json", {})
            timings[phase] = round(timings.get(phase, 0.0) + time.perf_counter() - began, 2)
            write_json(self.folder / "timings.json", timings)

    def _refuse_changed_recipe(self, stages: list[config.AnyStage]) -> None:
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
