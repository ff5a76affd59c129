{{- define "rkv-vllm.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "rkv-vllm.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- $name := include "rkv-vllm.name" . -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "rkv-vllm.selectorLabels" -}}
app.kubernetes.io/name: {{ include "rkv-vllm.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{- define "rkv-vllm.labels" -}}
{{ include "rkv-vllm.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service | quote }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | quote }}
{{- end -}}

{{- define "rkv-vllm.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{- define "rkv-vllm.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default (include "rkv-vllm.fullname" .) -}}
{{- else -}}
{{- .Values.serviceAccount.name | default "default" -}}
{{- end -}}
{{- end -}}

{{/* The Secret that holds the file of API keys, or nothing where the server takes none. */}}
{{- define "rkv-vllm.apiKeySecret" -}}
{{- if .Values.apiKeys.existingSecret -}}
{{- .Values.apiKeys.existingSecret -}}
{{- else if .Values.apiKeys.entries -}}
{{- include "rkv-vllm.fullname" . }}-api-keys
{{- end -}}
{{- end -}}

{{/* From the first second of preStop until the engine has ended. */}}
{{- define "rkv-vllm.gracePeriod" -}}
{{- add .Values.shutdown.preStopSeconds .Values.shutdown.drainSeconds .Values.shutdown.engineSeconds -}}
{{- end -}}

{{/* Labels by which Prometheus knows the pods of this release, when it scrapes them by the ServiceMonitor. */}}
{{- define "rkv-vllm.series" -}}
namespace="{{ .Release.Namespace }}",service="{{ include "rkv-vllm.fullname" . }}"
{{- end -}}

{{/* Options of `rkv-vllm serve`, each a list of name and value; nothing and false are no option, true has no value. */}}
{{- define "rkv-vllm.options" -}}
{{- $values := .Values -}}
{{- list
  (list "host" "0.0.0.0")
  (list "port" 8000)
  (list "served-model-name" $values.servedModelName)
  (list "tensor-parallel-size" (gt (int $values.gpu.count) 1 | ternary $values.gpu.count false))
  (list "kv-budget" $values.kvCache.budget)
  (list "kv-budget-min" $values.kvCache.budgetMin)
  (list "kv-budget-max" $values.kvCache.budgetMax)
  (list "kv-min-budget" $values.kvCache.minBudget)
  (list "kv-max-budget" $values.kvCache.maxBudget)
  (list "kv-auto-usage" $values.kvCache.autoUsage)
  (list "kv-require-budget" $values.kvCache.requireBudget)
  (list "kv-buffer" $values.kvCache.buffer)
  (list "kv-policy" $values.kvCache.policy)
  (list "kv-policies" (join "," $values.kvCache.policies))
  (list "kv-protect" $values.kvCache.protect)
  (list "kv-mix-lambda" $values.kvCache.mixLambda)
  (list "kv-granularity" $values.kvCache.granularity)
  (list "kv-scope" $values.kvCache.scope)
  (list "kv-order" $values.kvCache.order)
  (list "kv-beyond-pool" $values.kvCache.beyondPool)
  (list "kv-key-policies" (empty $values.kvCache.keyPolicies | ternary false "/etc/rkv-vllm/policies/key-policies.yaml"))
  (list "max-model-len" $values.engine.maxModelLen)
  (list "max-num-seqs" $values.engine.maxNumSeqs)
  (list "gpu-memory-utilization" $values.engine.gpuMemoryUtilization)
  (list "limit-body-bytes" $values.limits.bodyBytes)
  (list "limit-max-tokens" $values.limits.maxTokens)
  (list "limit-n" $values.limits.answers)
  (list "limit-concurrent" $values.limits.concurrent)
  (list "limit-concurrent-per-key" $values.limits.concurrentPerKey)
  (list "open-metrics" $values.openMetrics)
  (list "open-routes" (join "," $values.openRoutes))
  (list "api-key-file" (empty (include "rkv-vllm.apiKeySecret" .) | ternary false "/etc/rkv-vllm/keys/api-keys"))
  (list "access-log" $values.accessLog)
  (list "shutdown-timeout" $values.shutdown.drainSeconds)
  | toJson -}}
{{- end -}}

{{/* What the container runs with. */}}
{{- define "rkv-vllm.arguments" -}}
- {{ .Values.model | quote }}
{{- range include "rkv-vllm.options" . | fromJsonArray }}
{{- $name := first . }}
{{- $value := last . }}
{{- if eq (toJson $value) "true" }}
- {{ printf "--%s" $name | quote }}
{{- else if not (has $value (list nil false "")) }}
- {{ printf "--%s=%s" $name (kindIs "string" $value | ternary $value (toJson $value)) | quote }}
{{- end }}
{{- end }}
{{- range .Values.engine.extraArgs }}
- {{ . | quote }}
{{- end }}
{{- end -}}
