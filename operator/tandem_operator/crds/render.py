"""CRDs as YAML text: plain for `crds/`, and wrapped for the chart."""

from typing import Any

import yaml

from tandem_operator.crds.kinds import Kind

_NOTICE = "# Generated from operator/tandem_operator/api by `make gen`; don't edit.\n"


class _Dumper(yaml.SafeDumper):
    """Safe YAML without anchors and with list items indented."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def to_yaml(manifest: dict[str, Any]) -> str:
    """One YAML document, keys in the order given."""
    return yaml.dump(manifest, Dumper=_Dumper, sort_keys=False, width=100, allow_unicode=True)


def render_crd(kind: Kind) -> str:
    """The file in `crds/`."""
    return _NOTICE + to_yaml(kind.to_manifest())


def render_chart_template(kind: Kind) -> str:
    """The chart's copy: a template, so that `helm upgrade` upgrades it; kept on uninstall.

    `crds.install: false` leaves the CRDs to whoever else manages them, `crds.keep: false` lets
    uninstalling delete them and with them every service.
    """
    manifest = kind.to_manifest()
    labels = manifest["metadata"].pop("labels")
    # A name that no YAML needs to quote, so that the text can be replaced by the template's own.
    manifest["metadata"]["labels"] = "CHART-LABELS"
    text = to_yaml(manifest)
    if "{{" in text:
        raise ValueError(f"{kind.crd_name} holds {{{{, which Helm would take for a template")
    component = labels["app.kubernetes.io/component"]
    metadata = (
        "labels:\n"
        '    {{- include "tandem.labels" . | nindent 4 }}\n'
        f"    app.kubernetes.io/component: {component}\n"
        "  {{- if .Values.crds.keep }}\n"
        "  annotations:\n"
        "    helm.sh/resource-policy: keep\n"
        "  {{- end }}"
    )
    body = text.replace("labels: CHART-LABELS", metadata, 1)
    return f"{_NOTICE}{{{{- if .Values.crds.install }}}}\n{body}{{{{- end }}}}\n"
