{{- /* Grafana's JSON of a dashboard. The files in dashboards/ have what differs between panels:

title: …
variables:                     # each a list of the values of a label, by the variables before it
  - {name: service, of: metric, label: label, all: true}
panels:
  - title: …
    type: timeseries           # or stat, or state-timeline; timeseries is the default
    unit: s                    # of Grafana
    width: 8                   # of 24 columns; 8 is the default
    max: 1                     # of the axis
    queries:
      - {expr: …, legend: "{{pod}}"}
*/ -}}
{{- define "tandem.dashboard" -}}
{{- $source := dict "type" "prometheus" "uid" "${datasource}" -}}
{{- $variables := list (dict "name" "datasource" "label" "Data source" "type" "datasource" "query" "prometheus" "refresh" 1) -}}
{{- range $variable := .short.variables -}}
{{- $query := printf "label_values(%s, %s)" $variable.of $variable.label -}}
{{- $all := default false $variable.all -}}
{{- $variables = append $variables (dict "name" $variable.name "label" (title $variable.name) "type" "query" "datasource" $source "query" (dict "query" $query "refId" $variable.name) "definition" $query "refresh" 2 "sort" 1 "includeAll" $all "multi" $all "allValue" (ternary ".*" "" $all)) -}}
{{- end -}}
{{- $panels := list -}}
{{- $x := 0 -}}
{{- $y := 0 -}}
{{- $row := 0 -}}
{{- range $index, $panel := .short.panels -}}
{{- $type := default "timeseries" $panel.type -}}
{{- $width := int (default 8 $panel.width) -}}
{{- $height := ternary 4 8 (eq $type "stat") -}}
{{- if gt (add $x $width) 24 -}}
{{- $x = 0 -}}
{{- end -}}
{{- if eq $x 0 -}}
{{- $y = add $y $row -}}
{{- $row = $height -}}
{{- end -}}
{{- $targets := list -}}
{{- range $number, $query := $panel.queries -}}
{{- $targets = append $targets (dict "refId" (printf "%c" (add 65 $number)) "datasource" $source "expr" $query.expr "legendFormat" $query.legend "range" true) -}}
{{- end -}}
{{- $defaults := dict "unit" (default "short" $panel.unit) -}}
{{- if ne $type "state-timeline" -}}
{{- $_ := set $defaults "min" 0 -}}
{{- end -}}
{{- if hasKey $panel "max" -}}
{{- $_ := set $defaults "max" $panel.max -}}
{{- end -}}
{{- $options := dict "legend" (dict "displayMode" "list" "placement" "bottom" "showLegend" true) "tooltip" (dict "mode" "multi" "sort" "desc") -}}
{{- if eq $type "stat" -}}
{{- $options = dict "reduceOptions" (dict "calcs" (list "lastNotNull")) "colorMode" "none" "graphMode" "area" "textMode" "auto" -}}
{{- else if eq $type "state-timeline" -}}
{{- $holds := dict "0" (dict "text" "False" "color" "#8e8e8e" "index" 0) "1" (dict "text" "True" "color" "blue" "index" 1) -}}
{{- $_ := set $defaults "mappings" (list (dict "type" "value" "options" $holds)) -}}
{{- end -}}
{{- $panels = append $panels (dict "id" (add1 $index) "type" $type "title" $panel.title "description" (default "" $panel.description) "datasource" $source "gridPos" (dict "x" $x "y" $y "w" $width "h" $height) "fieldConfig" (dict "defaults" $defaults "overrides" list) "options" $options "targets" $targets) -}}
{{- $x = add $x $width -}}
{{- if ge $x 24 -}}
{{- $x = 0 -}}
{{- end -}}
{{- end -}}
{{- dict "uid" (printf "tandem-%s" .name) "title" .short.title "tags" (list "tandem") "schemaVersion" 39 "editable" true "refresh" "30s" "time" (dict "from" "now-1h" "to" "now") "templating" (dict "list" $variables) "panels" $panels | toPrettyJson -}}
{{- end -}}
