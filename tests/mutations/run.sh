#!/usr/bin/env bash
# Plants each bug of this folder, alone, in a copy of the project, and asks the tests whether they notice:
# first the classes its patch calls nearest, then, where those pass, every suite. README.md says how a patch is written.
#
#   tests/mutations/run.sh [--jobs N] [--nearest-only] [PART_OF_A_PATCH'S_PATH ...]
#
# Exit code 0: every bug was caught, but for those whose patch says why it may survive. 1: some were not, or a patch no longer applies or builds.
# 2: the tests fail without any bug, so that nothing can be said.
set -u
folder=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$folder/../.." && pwd)
export CI=true DOTNET_CLI_TELEMETRY_OPTOUT=1 DOTNET_NOLOGO=1

nearest_limit=180  # seconds
suite_limit=1200
suites="kernels engine server client python gpu perf house"

jobs=1; nearest_only=""; parts=()
while [ $# -gt 0 ]; do
    case $1 in
        --jobs) jobs=$2; shift ;;
        --nearest-only) nearest_only=yes ;;
        -*) sed -nE '2,/^[^#]/s/^# ?//p' "$0"; exit 2 ;;
        *) parts+=("$1") ;;
    esac
    shift
done

patches=()
while IFS= read -r patch; do
    [ ${#parts[@]} -eq 0 ] && { patches+=("$patch"); continue; }
    for part in "${parts[@]}"; do [[ $patch == *"$part"* ]] && { patches+=("$patch"); break; }; done
done < <(cd "$folder" && find . -name '*.patch' | sed 's|^\./||' | sort)
[ ${#patches[@]} -gt 0 ] || { echo "no patch matches" >&2; exit 2; }
[ "$jobs" -le ${#patches[@]} ] || jobs=${#patches[@]}

work=$(mktemp -d "${TMPDIR:-/tmp}/rollout-mutations.XXXXXX")
trap 'trap - TERM; rm -rf "$work"; kill 0' INT TERM
trap 'rm -rf "$work"' EXIT

python=""
for candidate in python3 /usr/bin/python3; do
    "$candidate" -c 'import grpc, google.protobuf, numpy' 2> /dev/null && { python=$candidate; break; }
done

header() { sed -nE "/^diff --git /q; s/^$2: *//p" "$folder/$1"; } # PATCH FIELD

build() { dotnet build -c Release --no-restore -v q "$1" > "$work/build-$copy.log" 2>&1; } # PROJECT_FOLDER

# Runs SUITE [CLASS ...] in this worker's copy, within LIMIT seconds. Without classes: all of it.
# (A shell's background jobs ignore SIGINT, and so would the servers that the tests interrupt.)
run() { # LIMIT SUITE [CLASS ...]
    local limit=$1 suite=$2; shift 2
    if [ "$suite" = python ] && [ $# -gt 0 ]; then
        [ -n "$python" ] || { echo "no python3 here can import grpc, google.protobuf and numpy"; return 3; }
        (cd tests/python && PYTHONDONTWRITEBYTECODE=1 timeout -k 10 "$limit" "$python" -m unittest --failfast "$@" 2>&1)
        return
    fi
    local filters=()
    for class in "$@"; do filters+=(-class "*.$class"); done
    env --default-signal=INT timeout -k 10 "$limit" "$(echo tests/"$suite"/bin/Release/net10.0/Rollout.*.Tests)" -noColor -noLogo -stopOnFail "${filters[@]}" 2>&1
}

# What a failing run says first: the test's name, or that it hung.
reason() { # LOG CODE
    [ "$2" -eq 124 ] || [ "$2" -eq 137 ] && { echo "hangs"; return; }
    local test
    test=$(sed -nE 's/^ *(Rollout\.[^ ]*Tests\.)?(.*) \[FAIL\].*/\2/p; s/^(FAIL|ERROR): (.*)/\2/p' "$1" | head -n 1)
    echo "${test:-exit code $2: $(tail -n 1 "$1")}"
}

new_copy() { # NUMBER
    copy=$1
    mkdir -p "$work/$copy" && cd "$work/$copy" || exit 2
    (cd "$root" && git ls-files -z --cached --others --exclude-standard | tar --null -T - -c --ignore-failed-read 2> /dev/null) | tar -x
    dotnet restore --locked-mode > "$work/build-$copy.log" 2>&1 && build . || { cat "$work/build-$copy.log"; exit 2; }
}

say() { printf '%-12s %5s s  %s%s\n' "$1" "$2" "$3" "${4:+  ($4)}" | tee -a "$work/results"; } # OUTCOME SECONDS PATCH NOTE

try() { # PATCH, planted
    local patch=$1 log="$work/run-$copy.log" started=$SECONDS code suite first="" line
    while read -r line; do
        set -- $line
        first=${first:-$1}
        build "tests/$1" || { say "not built" $((SECONDS - started)) "$patch" "$(grep -m 1 -o 'error .*' "$work/build-$copy.log" | cut -c -100)"; return; }
        run $nearest_limit "$@" > "$log"; code=$?
        [ $code -eq 0 ] || { say killed $((SECONDS - started)) "$patch" "$(reason "$log" $code)"; return; }
    done < <(header "$patch" Nearest)

    local survives; survives=$(header "$patch" Survives)
    [ -z "$survives" ] || { say accepted $((SECONDS - started)) "$patch" "$survives"; return; }
    [ -z "$nearest_only" ] || { say survived $((SECONDS - started)) "$patch" "the nearest tests"; return; }
    build . || { say "not built" $((SECONDS - started)) "$patch"; return; }
    for suite in $first $suites; do
        run $suite_limit "$suite" > "$log"; code=$?
        [ $code -eq 0 ] || { say "killed late" $((SECONDS - started)) "$patch" "$suite: $(reason "$log" $code)"; return; }
    done
    say survived $((SECONDS - started)) "$patch" "every suite"
}

# Every class that a patch calls nearest must exist, and pass where nothing is planted.
baseline() {
    local suite classes log="$work/baseline.log" code
    for suite in $suites; do
        classes=$(for patch in "${patches[@]}"; do header "$patch" Nearest; done | awk -v suite="$suite" '$1 == suite { $1 = ""; print }' | tr ' ' '\n' | sed '/^$/d' | sort -u)
        [ -n "$classes" ] || continue
        for class in $classes; do
            [ "$suite" = python ] || grep -rqE "class $class\b" "tests/$suite" --include='*.cs' || { echo "tests/$suite has no class $class"; return 2; }
        done
        run $suite_limit "$suite" $classes > "$log"; code=$?
        [ $code -eq 0 ] || { echo "without any bug, tests/$suite fails: $(reason "$log" $code)"; cat "$log"; return 2; }
    done
}

worker() { # NUMBER
    local i patch
    [ "$1" -eq 0 ] || new_copy "$1"
    for ((i = $1; i < ${#patches[@]}; i += jobs)); do
        patch=${patches[i]}
        [ -n "$(header "$patch" Nearest)" ] || { say "no nearest" 0 "$patch"; continue; }
        git apply -C1 "$folder/$patch" 2> /dev/null || { say "not applied" 0 "$patch"; continue; }
        try "$patch"
        git apply -C1 -R "$folder/$patch" || exit 2
    done
}

echo "${#patches[@]} bugs; first the tests without any"
(new_copy 0 && baseline) || exit 2
cd "$work/0" && copy=0 || exit 2
for ((n = 1; n < jobs; n++)); do worker "$n" & done
worker 0
wait

count() { grep -c "^$1 " "$work/results"; }
echo
echo "$(count killed) killed by the nearest tests, $(count 'killed late') by another suite, $(count survived) survived, $(count accepted) accepted," \
    "$(grep -cE '^(not applied|not built|no nearest) ' "$work/results") patches to mend"
! grep -qE '^(survived|not applied|not built|no nearest) ' "$work/results"
