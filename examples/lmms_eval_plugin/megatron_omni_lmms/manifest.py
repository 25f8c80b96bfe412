"""What the entry point ``lmms_eval.models`` gives to lmms-eval: the name of the model and where its class is."""

from typing import Any


def manifest() -> Any:
    """The ``ModelManifest`` of ``megatron_omni``; lmms-eval is imported here, so that the rest can be read without it."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="megatron_omni",
        chat_class_path="megatron_omni_lmms.model.MegatronOmni",
        simple_class_path="megatron_omni_lmms.model.MegatronOmniSimple",
    )
