"""Cell magics of the notebooks: `%%known` needs the truth about who speaks and runs on the tiny model alone, `%%downloaded` on others alone."""

from IPython import get_ipython


def register(known: bool) -> None:
    """Define `%%known` and `%%downloaded` in the running notebook, if there is one."""
    shell = get_ipython()
    if shell is None:
        return

    def run(cell):
        exec(compile(cell, shell.compile.cache(cell), "exec"), shell.user_ns)

    def run_if_known(line, cell):
        if known:
            run(cell)
        else:
            print("Left out: this needs the tiny model, of which it is known who speaks (or a table of it).")

    shell.register_magic_function(run_if_known, magic_kind="cell", magic_name="known")
    shell.register_magic_function(lambda line, cell: None if known else run(cell), magic_kind="cell", magic_name="downloaded")
