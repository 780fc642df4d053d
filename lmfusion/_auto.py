"""How does transformers' AutoModel learn of this package, without `import lmfusion` having to import transformers?

`lmfusion.model.modeling` registers with AutoConfig and AutoModel. It is imported here once transformers has loaded AutoModel.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

AUTO_MODULE = "transformers.models.auto.modeling_auto"


def register_with_transformers() -> None:
    """Register now if AutoModel is loaded, else right after it has been."""
    if AUTO_MODULE in sys.modules:
        importlib.import_module("lmfusion.model.modeling")
    else:
        sys.meta_path.insert(0, _AutoModelFinder())


class _AutoModelFinder(MetaPathFinder):
    """Steps in for the one module it waits for, and then is gone."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != AUTO_MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


class _RegisteringLoader(Loader):
    """Another loader, followed by the registration."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        importlib.import_module("lmfusion.model.modeling")
