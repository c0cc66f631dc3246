{{- define "tandem.name" -}}
{{- default "tandem-operator" .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "tandem.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" -}}
{{- else if contains (include "tandem.name" .) .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else if eq .Release.Name "tandem" -}}
{{- include "tandem.name" . | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "tandem.name" .) | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "tandem.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: tandem
{{ include "tandem.selectorLabels" . }}
{{- end -}}

{{- define "tandem.selectorLabels" -}}
app.kubernetes.io/name: {{ include "tandem.name" . }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{- define "tandem.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "tandem.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- required "serviceAccount.name is required when serviceAccount.create is false" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- /* REPOSITORY:TAG, REPOSITORY@DIGEST, or with both REPOSITORY:TAG@DIGEST. */ -}}
{{- define "tandem.image" -}}
{{- $tag := .image.tag -}}
{{- if not (or $tag .image.digest) -}}
{{- $tag = .appVersion -}}
{{- end -}}
{{- .image.repository }}{{ with $tag }}:{{ . }}{{ end }}{{ with .image.digest }}@{{ . }}{{ end -}}
{{- end -}}

{{- /* A name for roles, of which there is one per release of the cluster: neither a namespace nor
a release may have a colon in its name. */ -}}
{{- define "tandem.roleName" -}}
{{- printf "tandem:%s:%s" .Release.Namespace .Release.Name -}}
{{- end -}}

{{- define "tandem.leaseName" -}}
{{- default (include "tandem.fullname" .) .Values.leaderElection.leaseName -}}
{{- end -}}

{{- /* What the operator may do in each namespace that it works in. It creates roles without the
verbs `bind` and `escalate`: Kubernetes then lets it grant only what it holds itself, which is
reading pods. Nothing here reads a secret: to change or to delete one shows it too, so it only
creates them. */ -}}
{{- define "tandem.rules" -}}
- apiGroups: [tandem.dev]
  resources: [inferenceservices]
  verbs: [get, list, watch, patch]
- apiGroups: [tandem.dev]
  resources: [workerpools]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [tandem.dev]
  resources: [autoscalingpolicies]
  verbs: [get, list, watch]
- apiGroups: [tandem.dev]
  resources: [inferenceservices/status, workerpools/status, autoscalingpolicies/status]
  verbs: [patch]
- apiGroups: [tandem.dev]
  resources: [inferenceservices/finalizers, workerpools/finalizers]
  verbs: [update]
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [pods/log]
  verbs: [get]
- apiGroups: [""]
  resources: [secrets]
  verbs: [create]
- apiGroups: [""]
  resources: [services, serviceaccounts]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [apps]
  resources: [deployments, controllerrevisions]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [rbac.authorization.k8s.io]
  resources: [roles, rolebindings]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [policy]
  resources: [poddisruptionbudgets]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [resource.k8s.io]
  resources: [resourceclaimtemplates]
  verbs: [get, list, create, patch, delete]
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [create, list]
{{- end -}}
