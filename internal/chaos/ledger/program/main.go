// Command program is the ledger's program (see package ledger).
package main

import (
	"fmt"
	"os"

	"github.com/moonladderstudios/mm-orchestrator/internal/chaos/ledger"
)

func main() {
	code, err := ledger.Run(os.Args[1:])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	os.Exit(code)
}
