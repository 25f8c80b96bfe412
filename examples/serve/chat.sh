#!/bin/sh
# The same with curl:   sh examples/serve/chat.sh "what is it?" cat.png
# URL=http://127.0.0.1:8000 MODEL=quickstart OMNI_API_KEY=... may stand in the environment.
set -eu
question=$1 picture=${2:-}
url=${URL:-http://127.0.0.1:8000} model=${MODEL:-quickstart}

# JSON needs quotes, backslashes and ends of lines of the question escaped.
text=$(printf '%s' "$question" | sed 's/\\/\\\\/g; s/"/\\"/g' | awk '{ printf "%s%s", (NR > 1 ? "\\n" : ""), $0 }')
parts="{\"type\": \"text\", \"text\": \"$text\"}"

{
  printf '{"model": "%s", "temperature": 0, "max_completion_tokens": 64, "messages": [{"role": "user", "content": [' "$model"
  if [ -n "$picture" ]; then
    printf '{"type": "image_url", "image_url": {"url": "data:image/png;base64,'
    base64 < "$picture" | tr -d '\n'
    printf '"}}, '
  fi
  printf '%s]}]}' "$parts"
} | curl --silent --show-error --fail-with-body "$url/v1/chat/completions" \
  --header 'Content-Type: application/json' --header "Authorization: Bearer ${OMNI_API_KEY:-none}" --data @-
echo
