module example.com/stranger

go 1.26

require github.com/moonladderstudios/mm-orchestrator v0.0.0

replace github.com/moonladderstudios/mm-orchestrator => ../..
