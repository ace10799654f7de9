"""Makes transformers' Auto classes know recursive models."""

from __future__ import annotations


def register_with_transformers() -> None:
    """Let ``AutoConfig`` and ``AutoModelForCausalLM`` load recursive models; imports transformers.

    Once is enough, and again does no harm.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from effinfer.recursive.config import RecursiveConfig
    from effinfer.recursive.modeling import RecursiveForCausalLM

    AutoConfig.register(RecursiveConfig.model_type, RecursiveConfig, exist_ok=True)
    AutoModelForCausalLM.register(RecursiveConfig, RecursiveForCausalLM, exist_ok=True)
