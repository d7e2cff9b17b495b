// Command program is the plans' program of package changetest (see package command).
package main

import (
	"fmt"
	"os"

	"github.com/moonladderstudios/mm-orchestrator/internal/changetest/command"
)

func main() {
	code, err := command.Run(os.Args[1:])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	os.Exit(code)
}
