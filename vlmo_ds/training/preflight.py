"""The command `python -m vlmo_ds.training.preflight`, which lives in vlmo_ds.planning.preflight now."""

import runpy

if __name__ == "__main__":
    runpy.run_module("vlmo_ds.planning.preflight", run_name="__main__", alter_sys=True)
