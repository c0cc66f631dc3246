{{- /* What the schema can't say, or can't say with a remedy. The first wrong value ends helm. */ -}}
{{- define "tandem.checks" -}}
{{- include "tandem.checkNames" . -}}
{{- range $path, $image := dict "image" .Values.image "images.router" .Values.images.router "images.engine" .Values.images.engine -}}
{{- include "tandem.checkImage" (dict "path" $path "image" $image) -}}
{{- end -}}
{{- include "tandem.checkBudget" . -}}
{{- include "tandem.checkLabels" (dict "path" "podLabels" "labels" .Values.podLabels) -}}
{{- range $part := list "serviceMonitor" "podMonitor" "prometheusRule" "dashboards" -}}
{{- include "tandem.checkLabels" (dict "path" (printf "metrics.%s.labels" $part) "labels" (get $.Values.metrics $part).labels) -}}
{{- end -}}
{{- include "tandem.checkExtras" . -}}
{{- end -}}

{{- define "tandem.checkNames" -}}
{{- $names := dict "leaderElection.leaseName" .Values.leaderElection.leaseName "serviceAccount.name" .Values.serviceAccount.name "priorityClassName" .Values.priorityClassName -}}
{{- range $path, $name := $names -}}
{{- if and $name (or (gt (len $name) 253) (not (regexMatch `^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$` $name))) -}}
{{- fail (printf "%s is %q, which is not a name of a Kubernetes object: use lower-case letters, digits, '-' and '.', with a letter or a digit at both ends, at most 253 in all" $path $name) -}}
{{- end -}}
{{- end -}}
{{- /* They become names of Services and values of labels. */ -}}
{{- range $path, $name := dict "fullnameOverride" .Values.fullnameOverride "nameOverride" .Values.nameOverride -}}
{{- if and $name (not (regexMatch `^[a-z]([-a-z0-9]*[a-z0-9])?$` $name)) -}}
{{- fail (printf "%s is %q, which is not a name of a Service: use lower-case letters, digits and '-', with a letter at the start and no '-' at the end" $path $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "tandem.checkImage" -}}
{{- if regexMatch `@|:[^/]*$` .image.repository -}}
{{- fail (printf "%s.repository is %q, which has a tag or a digest: put them into %s.tag and %s.digest" .path .image.repository .path .path) -}}
{{- end -}}
{{- if and .image.tag (not (regexMatch `^\w[\w.-]{0,127}$` .image.tag)) -}}
{{- fail (printf "%s.tag is %q, which is not a tag: use letters, digits, '_', '.' and '-', at most 128 in all, and put a digest into %s.digest" .path .image.tag .path) -}}
{{- end -}}
{{- if and .image.digest (not (regexMatch `^sha256:[0-9a-f]{64}$` .image.digest)) -}}
{{- fail (printf "%s.digest is %q, which is not a digest: use sha256: and 64 hexadecimal digits, as `docker buildx imagetools inspect` prints them" .path .image.digest) -}}
{{- end -}}
{{- end -}}

{{- define "tandem.checkBudget" -}}
{{- $value := .Values.podDisruptionBudget.maxUnavailable -}}
{{- $text := toString $value -}}
{{- $remedy := "use a number such as 1, or a percentage such as 50%" -}}
{{- if not (regexMatch `^([0-9]+|([0-9]|[1-9][0-9]|100)%)$` $text) -}}
{{- fail (printf "podDisruptionBudget.maxUnavailable is %q, which is neither a number nor a percentage: %s" $text $remedy) -}}
{{- end -}}
{{- $num := int (trimSuffix "%" $text) -}}
{{- if not $num -}}
{{- fail (printf "podDisruptionBudget.maxUnavailable is %q, so no node with an operator could be drained: %s" $text $remedy) -}}
{{- end -}}
{{- if hasSuffix "%" $text -}}
{{- /* Kubernetes rounds up. */ -}}
{{- $num = div (add (mul $num (int .Values.replicas)) 99) 100 -}}
{{- end -}}
{{- if and .Values.podDisruptionBudget.enabled (ge (int $num) (int .Values.replicas)) -}}
{{- fail (printf "podDisruptionBudget.maxUnavailable is %q, which lets all operators go at once when replicas is %d: raise replicas, lower maxUnavailable, or set podDisruptionBudget.enabled to false" $text (int .Values.replicas)) -}}
{{- end -}}
{{- end -}}

{{- define "tandem.checkLabels" -}}
{{- $path := .path -}}
{{- range $name := list "app.kubernetes.io/name" "app.kubernetes.io/instance" "app.kubernetes.io/component" "app.kubernetes.io/version" "app.kubernetes.io/managed-by" "app.kubernetes.io/part-of" "helm.sh/chart" -}}
{{- if hasKey $.labels $name -}}
{{- fail (printf "%s has %q, which the chart writes itself: leave it out" $path $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "tandem.checkExtras" -}}
{{- $flags := dict "router-image" "images.router" "engine-image" "images.engine" "router-pull-policy" "images.router.pullPolicy" "engine-pull-policy" "images.engine.pullPolicy" "namespace" "watchNamespaces" "lease-name" "leaderElection.leaseName" "log-level" "logLevel" "health-port" "" "metrics-port" "" -}}
{{- range $argument := .Values.extraArgs -}}
{{- $flag := trimPrefix "--" (first (splitList "=" $argument)) -}}
{{- if hasKey $flags $flag -}}
{{- $value := get $flags $flag -}}
{{- fail (printf "extraArgs has %q, which the chart writes itself: leave it out%s" $argument (ternary (printf ", and set %s" $value) "" (ne $value ""))) -}}
{{- end -}}
{{- end -}}
{{- range .Values.extraEnv -}}
{{- if or (hasPrefix "TANDEM_" .name) (has .name (list "POD_NAME" "POD_NAMESPACE")) -}}
{{- fail (printf "extraEnv has %q, in whose place the chart writes a flag or a variable itself: leave it out, and set the value of the chart" .name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
