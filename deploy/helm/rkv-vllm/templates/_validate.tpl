{{/*
What no schema can say: values that are right alone and wrong together. Kubernetes would refuse the object, or the
server would end when it starts. A line for each problem, which begins with the value's name; the Deployment fails by it.
*/}}
{{- define "rkv-vllm.problems" -}}
{{- include "rkv-vllm.problems.names" . }}
{{- include "rkv-vllm.problems.scaling" . }}
{{- include "rkv-vllm.problems.keys" . }}
{{- include "rkv-vllm.problems.kvCache" . }}
{{- include "rkv-vllm.problems.extraArgs" . }}
{{- include "rkv-vllm.problems.resources" . }}
{{- include "rkv-vllm.problems.pod" . }}
{{- end -}}

{{/* A Service's name is the strictest: a label of RFC 1035. */}}
{{- define "rkv-vllm.problems.names" -}}
{{- $name := include "rkv-vllm.fullname" . }}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $name) }}
fullnameOverride: needed, since the release's name makes {{ $name }}, and a Service's name has only a-z, 0-9 and -, and begins with a letter
{{- end }}
{{- end -}}

{{- define "rkv-vllm.problems.scaling" -}}
{{- with .Values.strategy }}
{{- $update := .rollingUpdate | default dict }}
{{- if and (eq .type "RollingUpdate") (hasKey $update "maxSurge") (hasKey $update "maxUnavailable") }}
{{- if and (regexMatch "^0+%?$" (toString $update.maxSurge)) (regexMatch "^0+%?$" (toString $update.maxUnavailable)) }}
strategy.rollingUpdate: maxSurge and maxUnavailable must not both be 0
{{- end }}
{{- end }}
{{- end }}
{{- with .Values.autoscaling }}
{{- if and .enabled (gt (int .minReplicas) (int .maxReplicas)) }}
autoscaling.minReplicas: must not be above autoscaling.maxReplicas
{{- end }}
{{- end }}
{{- end -}}

{{- define "rkv-vllm.problems.keys" -}}
{{- with .Values.apiKeys }}
{{- if and .entries .existingSecret }}
apiKeys: give entries or existingSecret, not both
{{- end }}
{{- end }}
{{- with .Values.serviceMonitor }}
{{- if and .enabled (include "rkv-vllm.apiKeySecret" $) (not $.Values.openMetrics) (not .apiKeySecret) }}
serviceMonitor.apiKeySecret: /metrics takes an API key; name the Secret of Prometheus' key, or set openMetrics
{{- end }}
{{- end }}
{{- end -}}

{{/* As RkvConfig and KvSettings have it. */}}
{{- define "rkv-vllm.problems.kvCache" -}}
{{- with .Values.kvCache }}
{{- $shared := dict "budget" .budget "budget_min" .budgetMin "budget_max" .budgetMax
    "min_budget" .minBudget "max_budget" .maxBudget "require_budget" .requireBudget
    "policy" .policy "policies" .policies "protect" .protect }}
{{- include "rkv-vllm.problems.rules" (list "kvCache" $shared) }}
{{- range $digest, $own := .keyPolicies }}
{{- $rules := deepCopy $shared }}
{{- range $rule, $value := $own }}
{{- $_ := set $rules $rule $value }}
{{- end }}
{{- include "rkv-vllm.problems.rules" (list (printf "kvCache.keyPolicies.%s" $digest) $rules) }}
{{- end }}
{{- if and .beyondPool (eq (toString .budget) "full") }}
kvCache.beyondPool: needs a default kvCache.budget
{{- end }}
{{- if and (eq .granularity "page") (eq (toString .budget) "auto") }}
kvCache.granularity: budget auto needs token
{{- end }}
{{- if and (eq .granularity "page") (ne .scope "head") }}
kvCache.scope: {{ .scope }} needs kvCache.granularity token
{{- end }}
{{- if and (eq .granularity "page") (ne .order "temporal") }}
kvCache.order: {{ .order }} needs kvCache.granularity token
{{- end }}
{{- $parallel := regexMatch " (--pipeline[-_]parallel[-_]size|-pp)[= ]0*([2-9]|1[0-9])" (printf " %s" (join " " $.Values.engine.extraArgs)) }}
{{- if and (or (eq .granularity "page") (ne .scope "head")) (or $parallel (gt (int $.Values.gpu.count) 1)) }}
kvCache.{{ eq .granularity "page" | ternary "granularity" "scope" }}: one decision for all heads and layers needs one GPU, see gpu.count
{{- end }}
{{- end }}
{{- end -}}

{{/* As CallerRules has it, for all callers or for one key: takes the value's name and the rules. */}}
{{- define "rkv-vllm.problems.rules" -}}
{{- $name := first . }}
{{- with last . }}
{{- $smallest := .budget_min | default 9 | int64 }}
{{- $full := eq (toString .budget) "full" }}
{{- $auto := eq (toString .budget) "auto" }}
{{- $share := hasSuffix "%" (toString .budget) }}
{{- $least := .min_budget | default 1024 | int64 }}
{{- $tokens := $auto | ternary $least (int64 .budget) }}
{{- $needed := eq (toString .protect) "prompt" | ternary 0 (int64 .protect) | add 9 }}
{{- if and .budget_max (gt $smallest (int64 .budget_max)) }}
{{ $name }}.{{ eq $name "kvCache" | ternary "budgetMin" "budget_min" }}: {{ $smallest }} is above the largest budget, {{ int64 .budget_max }}
{{- else if not .require_budget }}
{{- if and (not $full) (not $auto) (not $share) (lt (int64 .budget) $smallest) }}
{{ $name }}.budget: the default, {{ int64 .budget }}, is below the smallest budget, {{ $smallest }}
{{- else if and .budget_max (or $full $auto (and (not $share) (gt (int64 .budget) (int64 .budget_max)))) }}
{{ $name }}.budget: the default, {{ .budget }}, is above the largest budget, {{ int64 .budget_max }}: give one within the bounds, or require one
{{- end }}
{{- end }}
{{- if and (not $full) (not $share) (gt $needed 9) (lt $tokens $needed) }}
{{ $name }}.protect: with the window of 8 tokens it leaves no room in the budget: at least {{ $needed }}
{{- end }}
{{- if and .max_budget (le (int64 .max_budget) $least) }}
{{ $name }}.{{ eq $name "kvCache" | ternary "maxBudget" "max_budget" }}: {{ int64 .max_budget }} is not above the least budget, {{ $least }}
{{- end }}
{{- if and .policies (not (has .policy .policies)) }}
{{ $name }}.policy: {{ .policy }} is not one of the policies {{ join ", " .policies }}
{{- end }}
{{- end }}
{{- end -}}

{{/* The first list: what the server, or what it needs of vLLM, refuses. Options of the chart's own would undo what was checked. */}}
{{- define "rkv-vllm.problems.extraArgs" -}}
{{- $refused := list "scheduler-cls" "worker-cls" "grpc" "speculative-config" "sc" "spec-method" "spec-model" "spec-tokens"
  "kv-transfer-config" "kv-offloading-size" "kv-cache-dtype-skip-layers" "decode-context-parallel-size" "dcp" "prefill-context-parallel-size" "pcp"
  "enable-dbo" "ubatch-size" }}
{{- $chart := list "api-key" "model" "tp" }}
{{- range include "rkv-vllm.options" . | fromJsonArray }}
{{- $chart = append $chart (first .) }}
{{- end }}
{{- $words := join " " .Values.engine.extraArgs }}
{{- if and (regexMatch "--kv[-_]cache[-_]dtype\\b[^-]" $words) (not (regexMatch "--kv[-_]cache[-_]dtype[= ](auto|float16|bfloat16|fp8|fp8_e4m3|fp8_e5m2)( |$)" $words)) }}
engine.extraArgs: the server takes --kv-cache-dtype auto, float16, bfloat16, fp8, fp8_e4m3 or fp8_e5m2
{{- end }}
{{- range .Values.engine.extraArgs }}
{{- $name := regexFind "^--?[a-zA-Z][-_a-zA-Z0-9]*" . | replace "_" "-" | trimPrefix "-" | trimPrefix "-" }}
{{- if has $name $refused }}
engine.extraArgs: the server does not take {{ . }}
{{- else if has $name $chart }}
engine.extraArgs: {{ . }} has a value of the chart
{{- end }}
{{- end }}
{{- end -}}

{{- define "rkv-vllm.problems.resources" -}}
{{- $limits := .Values.resources.limits | default dict }}
{{- range $resource, $request := .Values.resources.requests }}
{{- $limit := get $limits $resource }}
{{- if eq $resource $.Values.gpu.resource }}
{{- else if regexMatch "/|^hugepages-" $resource }}
{{- if ne (toString $request) (toString $limit) }}
resources.requests.{{ $resource }}: must be the limit too, as for each device
{{- end }}
{{- else if hasKey $limits $resource }}
{{- if gt (include "rkv-vllm.quantity" $request | float64) (include "rkv-vllm.quantity" $limit | float64) }}
resources.requests.{{ $resource }}: {{ $request }} is above the limit, {{ $limit }}
{{- end }}
{{- end }}
{{- end }}
{{- range list "requests" "limits" }}
{{- if hasKey (get $.Values.resources . | default dict) $.Values.gpu.resource }}
resources.{{ . }}.{{ $.Values.gpu.resource }}: gpu.count says how many
{{- end }}
{{- end }}
{{- end -}}

{{/* A quantity of Kubernetes' as a plain number. */}}
{{- define "rkv-vllm.quantity" -}}
{{- $units := dict "m" 0.001 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "P" 1e15 "E" 1e18
  "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 "Pi" 1125899906842624 "Ei" 1152921504606846976 }}
{{- $unit := kindIs "string" . | ternary (regexFind "[A-Za-z]+$" (toString .)) "" }}
{{- mulf (toString . | trimSuffix $unit | float64) (get $units $unit | default 1) }}
{{- end -}}

{{- define "rkv-vllm.problems.pod" -}}
{{- $names := list }}
{{- if .Values.huggingFaceToken.existingSecret }}
{{- $names = list "HF_TOKEN" }}
{{- end }}
{{- range .Values.extraEnv }}
{{- if has .name $names }}
extraEnv: {{ .name }} is there twice
{{- end }}
{{- if and (regexMatch "(?i)^rkv_" .name) (ne .name "RKV_API_KEYS") }}
extraEnv: {{ .name }} has a value of the chart
{{- else if has .name (list "VLLM_USE_RUST_FRONTEND" "VLLM_USE_V2_MODEL_RUNNER") }}
extraEnv: the server does not take {{ .name }}
{{- else if and (eq .name "VLLM_API_KEY") (contains "," (.value | default "")) }}
extraEnv: VLLM_API_KEY takes one key; see apiKeys
{{- end }}
{{- $names = append $names .name }}
{{- end }}
{{- $volumes := list "cache" "shared-memory" "temporary" "api-keys" "key-policies" }}
{{- range .Values.extraVolumes }}
{{- if has .name $volumes }}
extraVolumes: {{ .name }} is there twice
{{- end }}
{{- $volumes = append $volumes .name }}
{{- end }}
{{- $paths := list "/cache" "/dev/shm" "/tmp" "/etc/rkv-vllm/keys" "/etc/rkv-vllm/policies" }}
{{- range .Values.extraVolumeMounts }}
{{- if not (has .name $volumes) }}
extraVolumeMounts: there is no volume {{ .name }}
{{- end }}
{{- if has .mountPath $paths }}
extraVolumeMounts: {{ .mountPath }} is there twice
{{- end }}
{{- $paths = append $paths .mountPath }}
{{- end }}
{{- $spreads := list }}
{{- range .Values.topologySpreadConstraints }}
{{- $spread := list .topologyKey .whenUnsatisfiable }}
{{- if has $spread $spreads }}
topologySpreadConstraints: {{ join ", " $spread }} is there twice
{{- end }}
{{- $spreads = append $spreads $spread }}
{{- end }}
{{- end -}}
