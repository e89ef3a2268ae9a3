"""`python -m personas run`: execute the notebooks and print the table of claims."""

import argparse
import os
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(prog="personas", description="Persona features and emergent misalignment, end to end.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="execute the notebooks in order, then print the claims")
    run.add_argument("--profile", default="smollm2", help="smollm2 (default: notebooks 01 to 06 on a language model), smollm2-quick, colab, h100, h100-14b; "
                     "tiny (07 to 12, the world whose truth is known), smoke, tiny-full (its studies' tables, hours); or the path of a YAML")
    run.add_argument("--from", dest="start", metavar="NN", help="start at this notebook, e.g. 03")
    run.add_argument("--only", metavar="NN", help="run this notebook alone")
    run.add_argument("--seed", type=int, default=0, help="seed of fine-tunes and sampling (default 0)")
    run.add_argument("--plan", action="store_true", help="print what would run and how long, and stop")
    run.add_argument("--in-place", action="store_true", help="also write the executed notebooks back to notebooks/")
    claims = commands.add_parser("claims", help="print the table of claims of the last run")
    claims.add_argument("--profile", default="smollm2")
    claims.add_argument("--markdown", action="store_true", help="as README.md (smollm2) or Part II's page (tiny) has it")
    train = commands.add_parser("train", help="make the fine-tunes and the SAE alone, under `accelerate launch -m personas train` with several processes")
    swept = commands.add_parser("sweep", help="every fine-tune with several seeds, side by side (on a Ray cluster if the profile names one)")
    for each in (train, swept):
        each.add_argument("--profile", default="tiny")
    train.add_argument("--seed", type=int, default=0)
    swept.add_argument("--seeds", default="0,1,2", help="numbers with commas between")
    args = parser.parse_args()

    from personas import profile

    try:
        real = profile.load(args.profile).real
        if real is None or real.model.startswith("gguf:"):
            os.environ.setdefault("HF_HUB_OFFLINE", "1")
    except profile.ProfileError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    from personas import artifacts, claims as table, data, endpoint, figures, fit, model, pipeline, store, study, sweep
    from personas.pretrained import weights

    try:
        if args.command == "claims":
            name = profile.load(args.profile).name
            if args.markdown:
                kept = lambda profile: table.kept(figures.ROOT / "data" / profile / "claims.csv")
                print(table.replicated(kept(name), kept("tiny")) if name == "smollm2" else table.markdown(table.read(name)))
            else:
                pipeline.print_claims(name)
            return 0
        if args.command == "train":
            pipeline.train(artifacts.open_run(args.profile, args.seed))
            return 0
        chosen = profile.load(args.profile)
        if args.command == "sweep":
            if not all(s.strip().isdigit() for s in args.seeds.split(",")):
                raise ValueError(f"--seeds takes whole numbers with commas between, not {args.seeds!r}")
            print(sweep.fine_tunes(chosen, [int(s) for s in args.seeds.split(",")]).to_string(index=False))
            return 0
        if chosen.name == study.FULL:
            if args.seed or args.in_place:
                raise ValueError(f"{study.FULL} computes tables with the seeds in its own `study` section; leave out --seed and --in-place")
            wanted = pipeline.chosen_studies(args.start, args.only)
            print(study.plan(wanted, chosen))
            if not args.plan:
                study.write(wanted, chosen)
            return 0
        books = pipeline.chosen(args.start, args.only, chosen)
        if args.plan:
            print(pipeline.plan(chosen, books))
            return 0
        profile.need_gpu(chosen)
        source = str(Path(args.profile).resolve()) if args.profile.endswith((".yaml", ".yml")) else args.profile
        if args.seed < 0:
            raise ValueError(f"seed must be a whole number from 0 up, not {args.seed}")
        pipeline.run(chosen, books, source, args.seed, args.in_place)
        pipeline.print_claims(chosen.name)
    except (profile.ProfileError, store.StoreError, study.StudyError, pipeline.RunError, sweep.SweepError, model.ModelError, data.DataError, endpoint.EndpointError, fit.DoesNotFit,
            weights.WeightsError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
