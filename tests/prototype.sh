#!/bin/sh
# A session by the prototype's calls alone, as a script of its time makes one: create, connect, wait until the client ends, destroy.
#
#     prototype.sh URL USER PASSWORD_FILE
#
# Where the orchestrator gives people a password, its answer has it, and the file is not read. These calls tell no certificate, so the
# client cannot check it: a reason to move to /api/v1.
set -eu
url=$1 user=$2 file=$3

call() { # METHOD PATH [JSON]
    printf %s "${3-}" | curl --silent --show-error --fail-with-body --request "$1" \
        --header 'Content-Type: application/json' --data @- "$url$2"
}

session=$(call POST /api/session/create "$(jq --null-input --arg username "$user" '{username: $username}')")
id=$(printf %s "$session" | jq --raw-output .session_id)
address=$(printf %s "$session" | jq --raw-output .vm_ip)
printf %s "$session" | jq '{vm_name, vm_ip, username, status}'

if [ "$(printf %s "$session" | jq --raw-output .password)" != "" ]; then
    printf %s "$session" | jq --raw-output .password
else
    cat "$file" && echo
fi | xfreerdp "/v:$address" "/u:$user" /d: /cert:ignore /sec:tls /from-stdin:force || true

call POST /api/session/destroy "$(jq --null-input --arg session_id "$id" '{session_id: $session_id}')" | jq '{vm_name, status}'
call GET /api/sessions '' | jq --exit-status --arg id "$id" 'all(.sessions[]; .session_id != $id)'
