"""What each Python process below `kvplug run` does first, found through PYTHONPATH.

It waits for transformers' generate to be imported, and only then imports kvplug: a process that
generates nothing pays nothing. Standard library only, for whatever Python reads it. Source of the
way: `opentelemetry-instrument` and `ddtrace-run` start the same way.
"""

import importlib.machinery
import importlib.util
import os
import sys


class Wait:
    """A finder that finds nothing, but calls `then(module)` once the module `name` is there."""

    def __init__(self, name, then):
        self.name, self.then = name, then

    def find_spec(self, name, path=None, target=None):
        if name != self.name or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                self.then(module)

            spec.loader.exec_module = exec_module
        return spec


def start(generate):
    """Import kvplug, which reads the environment, or say why this process has no strategy."""
    try:
        import kvplug  # noqa: F401
    except Exception as e:  # whatever it is, the program never asked for kvplug
        print(
            f"kvplug run: {sys.executable} has no kvplug that works ({type(e).__name__}: {e}): its "
            "generate calls are left to transformers",
            file=sys.stderr,
        )


def serve(server):
    """Have `transformers serve` tell its clients what kvplug refuses."""
    from kvplug.serving import attach

    attach(server)


def others():
    """Run the sitecustomize that this one hides; this folder leaves the path."""
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.abspath(path) != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", sys.path)
    if spec is not None:
        module = importlib.util.module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


if __name__ == "sitecustomize":  # not when a test runner or a packager only looks at it
    if "KVPLUG_RUN" in os.environ:
        sys.meta_path[:0] = [
            Wait("transformers.generation.utils", start),
            Wait("transformers.cli.serving.server", serve),
        ]
    others()
