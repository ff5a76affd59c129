"""Which rules hold for the caller with an API key."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from rkv_vllm.server.caller_rules import CallerRules, KvSettings
from rkv_vllm.settings.config import EngineSettings
from rkv_vllm.settings.error_text import explain


@dataclass(frozen=True, slots=True)
class RulesByApiKey:
    """The rules of every caller.

    `by_key` has the rules of the API keys that differ, under the SHA-256 of the key in hexadecimal, so
    that neither the file nor this process need hold a key.
    """

    server: CallerRules
    by_key: Mapping[str, CallerRules]

    @classmethod
    def load(cls, settings: KvSettings) -> RulesByApiKey:
        """Raises: ValueError, naming the file, the key and the setting; OSError if there is no such file."""
        common = settings.model_dump(include=set(CallerRules.model_fields))
        server = CallerRules.model_validate(common).on_engine(settings)
        path = settings.key_policies
        return cls(server, {} if path is None else dict(_overrides(path, common, settings)))

    def of(self, key: str | None) -> CallerRules:
        """The rules for a request with this API key, or with none (None)."""
        if key is None or not self.by_key:
            return self.server
        return self.by_key.get(hashlib.sha256(key.encode()).hexdigest(), self.server)

    def describe(self) -> list[str]:
        """Lines for the log at start; no key appears, only the beginning of its digest."""
        keys = (f"API key {digest[:12]}...: {rules.describe()}" for digest, rules in self.by_key.items())
        return [f"KV cache: {self.server.describe()}", *keys]


def _overrides(
    path: Path, common: dict[str, Any], engine: EngineSettings
) -> Iterator[tuple[str, CallerRules]]:
    try:
        entries = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(entries, dict):
        raise ValueError(f"{path}: takes SHA-256 digests of API keys, with settings below each")
    for digest, settings in entries.items():
        if not isinstance(digest, str) or len(digest) != 64 or set(digest) - set("0123456789abcdef"):
            raise ValueError(f"{path}: an entry is not the SHA-256 of an API key in lower-case hexadecimal")
        if not isinstance(settings, dict):
            raise ValueError(f"{path}: key {digest[:12]}...: takes settings, such as `budget: 512`")
        try:
            rules = CallerRules.model_validate({**common, **settings})
        except ValidationError as error:
            raise ValueError(f"{path}: key {digest[:12]}...: {explain(error, depth=1)}") from None
        try:
            yield digest, rules.on_engine(engine)
        except ValueError as error:
            raise ValueError(f"{path}: key {digest[:12]}...: {error}") from None
