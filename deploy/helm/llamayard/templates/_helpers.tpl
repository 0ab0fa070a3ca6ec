{{- define "llamayard.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "llamayard.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" }}
{{- else if contains (include "llamayard.name" .) .Release.Name }}
{{- .Release.Name | trunc 63 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "llamayard.name" .) | trunc 63 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "llamayard.selector" -}}
app.kubernetes.io/name: {{ include "llamayard.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "llamayard.labels" -}}
{{ include "llamayard.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{/* The configuration: the chart's part over what the user gave, so that neither is lost. */}}
{{- define "llamayard.config" -}}
{{- $server := dict "host" "0.0.0.0" "port" 11434 }}
{{- if .Values.keys.existingSecret }}
{{- $_ := set $server "keys_file" "/etc/llamayard/keys/keys.json" }}
{{- end }}
{{- if .Values.allowAnonymous }}
{{- $_ := set $server "allow_anonymous" true }}
{{- end }}
{{- $own := dict "server" $server "state_directory" "/var/lib/llamayard/state" "ollama" (dict "models" "/var/lib/llamayard/models") }}
{{- toYaml (mergeOverwrite (deepCopy .Values.config) $own) }}
{{- end }}
