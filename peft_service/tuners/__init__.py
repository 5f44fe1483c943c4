"""Fine-tuning methods that PEFT does not have, as PEFT methods; importing this package registers them all.

A process that has not imported it cannot load such an adapter: PEFT answers with a KeyError of the method's
name. One file a method; `registration`, `wrapper` and `sites` are what they share.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
