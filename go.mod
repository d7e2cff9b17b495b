module github.com/moonladderstudios/mm-orchestrator

go 1.26.0
