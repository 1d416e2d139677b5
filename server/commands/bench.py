"""`eda bench`: measurements of a server and of this machine."""

import typer

from eda.server.commands import bench_adaptation, bench_calibrate, bench_serve

app = typer.Typer(help="Measure a server, or this machine.", no_args_is_help=True)
app.command("serve")(bench_serve.bench_serve)
app.command("calibrate")(bench_calibrate.calibrate)
if bench_adaptation.is_available():
    app.command("adaptation", context_settings=bench_adaptation.CONTEXT)(bench_adaptation.bench_adaptation)
