#!/usr/bin/env bash
# compare.sh BASE PACKAGES RUN COUNT: the Go benchmarks of a commit and of this tree, in
# turns, so that a machine that is slow for a minute is slow for both.
set -euo pipefail
base=$1 packages=$2 run=$3 count=$4
here=$PWD
folder=$(mktemp -d)
trap 'git worktree remove --force "$folder/base" 2>/dev/null || true; rm -rf "$folder"' EXIT
git worktree add --quiet --detach "$folder/base" "$base"
for round in $(seq "$count"); do
	echo "round $round of $count" >&2
	for tree in base here; do
		where=$here
		[ "$tree" = here ] || where=$folder/base
		# A package that is new has no benchmarks in the older commit.
		(cd "$where" && go test -run '^$' -bench "$run" -benchmem -count 1 $packages) >>"$folder/$tree.txt" || [ "$tree" = base ]
	done
done
bin/benchstat "$base=$folder/base.txt" "here=$folder/here.txt"
