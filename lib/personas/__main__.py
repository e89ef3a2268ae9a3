"""The command line: `python -m personas run` executes the notebooks and prints the table of claims."""

import argparse
import os
import sys
import warnings
from pathlib import Path

# Threads that spin while they wait take the core that the others need: beside one busy process a training
# step took three times as long; so it takes less than twice as long (benchmarks/busy.py). Before torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

PROFILES = (
    "smollm2 (default: notebooks 01 to 08 on a language model), smollm2-quick, colab, h100, h100-14b; "
    "tiny (09 to 15, the world whose truth is known), smoke, tiny-full and smollm2-full (tables, hours); "
    "or the path of a YAML"
)


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    found = argparse.ArgumentParser(
        prog="personas", description="Persona features and emergent misalignment, end to end."
    )
    commands = found.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="execute the notebooks in order, then print the claims")
    run.add_argument("--from", dest="start", metavar="NN", help="start at this notebook, e.g. 03")
    run.add_argument("--only", metavar="NN", help="run this notebook alone")
    run.add_argument("--plan", action="store_true", help="print what would run and how long, and stop")
    run.add_argument(
        "--in-place", action="store_true", help="write the executed notebooks to notebooks/, too"
    )
    claims = commands.add_parser("claims", help="print the table of claims of the last run")
    claims.add_argument("--markdown", action="store_true", help="as README.md or Part II's page has it")
    train = commands.add_parser(
        "train",
        help="make the fine-tunes and the SAE alone, under `accelerate launch` by several processes",
    )
    sweep = commands.add_parser("sweep", help="every fine-tune with several seeds, side by side or on Ray")
    sweep.add_argument("--seeds", default="0,1,2", help="numbers with commas between")
    explore = commands.add_parser(
        "explore",
        help="after a run: write what the site's pages of latents and the dial show; of profile tiny, the "
        "model that runs in the browser",
    )
    bench = commands.add_parser(
        "bench", help="score methods that claim to find a persona, where the truth is known"
    )
    bench.add_argument(
        "method", nargs="?", help="a .py file with find(case), or one that ships; absent: all of these"
    )
    bench.add_argument("--base-models", type=int, metavar="N", help="only the first N base models")
    bases = commands.add_parser(
        "keep-base-models", help="pretrain the profile's base models anew and commit them"
    )
    keep = commands.add_parser("keep-sae", help="train the SAE anew and put it among the committed content")
    commands.add_parser("fields", help="print every field of a profile, its default and what it is")
    for each in (run, train, explore, keep):
        each.add_argument("--seed", type=int, default=0, help="seed of fine-tunes and sampling (default 0)")
    defaults = {train: "tiny", sweep: "tiny", bench: "bench", bases: "bench"}
    for each in (run, claims, train, sweep, explore, keep, bench, bases):
        each.add_argument("--profile", default=defaults.get(each, "smollm2"), help=PROFILES)
        each.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="change a number of a shipped profile, e.g. narrow.lr=1e-3; once for each",
        )
    return found


def main() -> int:
    """Run one command; 2 and one line on stderr if it cannot be done."""
    args = parser().parse_args()
    warnings.simplefilter("ignore", FutureWarning)  # transformers' and TRL's, about each other
    if args.command == "fields":
        from personas import config

        for key, default, what in config.fields():
            print(f"{key:32s} {default:28s} {what}")
        return 0
    from personas import profile, store

    try:
        if args.set:
            store.writable(need_gb=0)  # where the changed profile is written
        if getattr(args, "seed", 0) < 0:
            raise profile.ProfileError(f"seed must be a whole number from 0 up, not {args.seed}")
        source = profile.with_settings(args.profile, args.set, store.ROOT / "profiles")
        real = profile.load(source).real
    except (profile.ProfileError, store.StoreError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.command == "bench" and args.method:
        from personas.bench import methods

        try:
            methods.load(args.method)
        except methods.MethodError as error:  # at once: what follows imports for ten seconds
            print(f"error: {error}", file=sys.stderr)
            return 2
    if real is None or real.model.startswith("gguf:"):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")

    from personas import data, endpoint, fit, model, parallel, pipeline, study
    from personas.pretrained import tables, weights

    try:
        do = {"run": _run, "claims": _claims, "train": _train, "sweep": _sweep, "explore": _explore}
        do |= {"keep-sae": _keep_sae, "keep-base-models": _keep_base_models, "bench": _bench}
        do[args.command](args, source)
    except (
        profile.ProfileError,
        store.StoreError,
        study.StudyError,
        tables.TableError,
        pipeline.RunError,
        parallel.WorkError,
        model.ModelError,
        data.DataError,
        endpoint.EndpointError,
        fit.DoesNotFit,
        weights.WeightsError,
        ValueError,
    ) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(args, source: str) -> None:
    from personas import pipeline, profile, studies, study
    from personas.pretrained import tables

    chosen = profile.load(source)
    for full, plan, write, listed in (
        (study.FULL, study.plan, study.write, studies.chosen),
        (tables.FULL, tables.plan, tables.write, tables.chosen),
    ):
        if chosen.name.startswith(full):  # also with --set
            if args.seed or args.in_place:
                raise ValueError(
                    f"{full} computes tables with its YAML's own seeds; leave out --seed and --in-place"
                )
            wanted = listed(args.start, args.only)
            print(plan(wanted, chosen))
            if not args.plan:
                profile.need_gpu(chosen)
                write(wanted, chosen)
            return
    books = pipeline.chosen(args.start, args.only, chosen)
    if args.plan:
        print(pipeline.plan(chosen, books))
        return
    profile.need_gpu(chosen)
    where = str(Path(source).resolve()) if source.endswith((".yaml", ".yml")) else source
    pipeline.run(chosen, books, where, args.seed, args.in_place)
    pipeline.print_claims(chosen.name)


def _claims(args, source: str) -> None:
    from personas import claims, figures, pipeline, profile, summary

    name = profile.load(source).name
    if not args.markdown:
        pipeline.print_claims(name)
        return
    kept = lambda profile: claims.kept(figures.table(profile, "claims"))
    if name == "smollm2":
        print(summary.replicated(kept(name), kept("tiny")))
    else:
        print(summary.markdown(claims.read(name)))


def _explore(args, source: str) -> None:
    from personas import artifacts, explore, live, profile
    from personas.chapters import common

    if profile.load(source).real:
        explore.write(common.open_run(source, args.seed))
    else:
        print(live.write(artifacts.open_run(source, args.seed)))


def _keep_sae(args, source: str) -> None:
    from personas import artifacts, known_latents, profile
    from personas.chapters import common
    from personas.pretrained import readings

    if profile.load(source).real:
        run = common.open_run(source, args.seed)
        print(readings.keep_sae(run, run.profile.sae.layer))
    else:
        print(known_latents.keep_sae(artifacts.open_run(source, args.seed)))


def _keep_base_models(args, source: str) -> None:
    from personas import artifacts
    from personas.bench import case

    run = artifacts.open_run(source)
    for seed in run.profile.study.pretraining_seeds:
        print(artifacts.keep_base(case.runs(run.profile, seed)))


def _bench(args, source: str) -> None:
    from personas import artifacts
    from personas.bench import run

    run.run(artifacts.open_run(source).profile, args.method, args.base_models)


def _train(args, source: str) -> None:
    from personas import pipeline, sweep

    sweep.train(pipeline.checked(source, args.seed), args.seed)


def _sweep(args, source: str) -> None:
    from personas import pipeline, profile, sweep

    if not all(s.strip().isdecimal() for s in args.seeds.split(",")):
        raise ValueError(f"--seeds takes whole numbers with commas between, not {args.seeds!r}")
    chosen = profile.load(source)
    if not chosen.cluster:  # whose machines are other ones than this
        pipeline.checked(source, 0)
    print(sweep.fine_tunes(chosen, [int(s) for s in args.seeds.split(",")]).to_string(index=False))


if __name__ == "__main__":
    sys.exit(main())
