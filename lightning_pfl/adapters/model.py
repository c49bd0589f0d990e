"""`CoLoraModel`: the PEFT tuner, registered with PEFT when this module is imported.

It makes `get_peft_model`, `PeftModel.from_pretrained`, `inject_adapter_in_model` and transformers' `add_adapter` work
with a `CoLoraConfig`. It adds to PEFT's own machinery only that the config is resolved on a copy before anything is
replaced, that running statistics are frozen with the weights, and that nothing is merged if anything cannot be.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

from torch import nn

from lightning_pfl.adapters._compat import BaseTuner, ExcludedModule, register
from lightning_pfl.adapters.adaptable import is_convolution
from lightning_pfl.adapters.config import KEY, CoLoraConfig
from lightning_pfl.adapters.layer import CoLoraConv, CoLoraLayer, CoLoraLinear
from lightning_pfl.adapters.listening import connect
from lightning_pfl.adapters.placement import Placement, matches
from lightning_pfl.adapters.statistics import hold, release

__all__ = ["CoLoraModel"]

log = logging.getLogger(__name__)


@final
class CoLoraModel(BaseTuner):
    """Co-LoRA adapters in a model, in place; what PEFT builds for a `CoLoraConfig`.

    Args:
        model: any module.
        peft_config: a `CoLoraConfig`; it is copied, the copy with its placement stands in ``peft_config``.
        adapter_name: PEFT's name of the adapter.

    Example:
        >>> from peft import get_peft_model
        >>> mlp = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> model = get_peft_model(mlp, CoLoraConfig(r=2, alpha=4, num_blocks=1))
        >>> model.peft_config["default"].placement
        {'0': None, '2': 'main/0/linear'}
    """

    prefix = "colora_"
    tuner_layer_cls = CoLoraLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - PEFT's attribute; unused, placement decides

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Resolve the config on a copy, then let PEFT replace the layers that it names."""
        config, placement = self.peft_config[adapter_name].resolved(model)
        self.peft_config[adapter_name] = config
        self.placement: Placement = placement
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        hold(model)
        if config.global_branch and config.gate.reads_input:
            connect(model)

    def _prepare_adapter_config(self, peft_config: CoLoraConfig, model_config: dict[str, Any]) -> CoLoraConfig:
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: CoLoraConfig, key: str) -> Any:
        assert peft_config.placement is not None, "the config is resolved before PEFT matches modules"
        if key in peft_config.placement:
            return True
        return ExcludedModule() if matches(key, peft_config.exclude_modules) else False

    def _create_and_replace(
        self,
        peft_config: CoLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, CoLoraLayer):
            target.update_layer(adapter_name, current_key, peft_config)
        else:
            kind = CoLoraConv if is_convolution(target) else CoLoraLinear
            layer = kind(target, adapter_name, current_key, peft_config)
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Our layers are made on the base layer's device, and on none while PEFT loads weights into empty ones."""
        setattr(parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT asks here for adapters by sample; a tuner that says nothing would ignore the wish without a word."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "Co-LoRA adapters cannot be chosen per sample with `adapter_names`. Call the model once per adapter, "
                "with `set_adapter` in between."
            )
        yield

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        release(model)
        return model

    def _check_merge_allowed(self) -> None:
        """Before the first layer is touched: none may refuse, and say that biases appear."""
        super()._check_merge_allowed()
        layers = [layer for layer in self.model.modules() if isinstance(layer, CoLoraLayer)]
        for layer in layers:
            for name in layer.active_adapters:
                if name in layer.colora_address:
                    layer.check_mergeable(name)
        if count := sum(
            layer.get_base_layer().bias is None and any(layer.colora_address.get(a) for a in layer.active_adapters)
            for layer in layers
        ):
            log.warning(
                "Merging gives %d layers a bias that they did not have (Q of a Co-LoRA layer is one). A class "
                "that builds these layers without a bias drops it when it loads the merged weights.",
                count,
            )


register(KEY, CoLoraConfig, CoLoraModel, CoLoraModel.prefix)
