// Command program refreshes the patches of known defects, or opens one to be
// edited. `make defects` starts it in the module's root.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/moonladderstudios/mm-orchestrator/internal/chaos/defects"
)

func main() {
	name := flag.String("name", "", "open this defect for an edit; without it, save what was edited and refresh all")
	files := flag.String("files", "", "files that it changes or adds besides those that it has, relative to the module's root, separated by blanks")
	breaks := flag.String("breaks", "", "one sentence: what is wrong in a worker that has it")
	flag.Parse()
	editor := defects.Editor{Module: ".", Patches: "internal/chaos/defects", Work: filepath.Join("var", "defects"), Output: os.Stdout}
	var err error
	if *name != "" {
		err = editor.Open(context.Background(), *name, *breaks, strings.Fields(*files))
	} else {
		err = editor.Refresh(context.Background())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "defects:", err)
		os.Exit(1)
	}
}
