// Command program runs the benchmarks of docs/benchmarks/README.md. `make bench`
// starts it with Celery. It is also the process of two contenders.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/moonladderstudios/mm-orchestrator/internal/bench"
	"github.com/moonladderstudios/mm-orchestrator/internal/bench/contender"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run() error {
	if len(os.Args) == 3 && os.Args[1] == bench.ContenderVerb {
		return compete(os.Args[2])
	}
	config := bench.Config{Output: os.Stdout, Command: strings.TrimSpace("make bench " + os.Getenv("MM_BENCH_VARIABLES"))}
	var cases, contenders string
	flag.BoolVar(&config.Short, "short", false, "fewer and shorter rounds, for a look in a few minutes")
	flag.IntVar(&config.Rounds, "rounds", 0, "how many rounds of each case (default 3, with -short 2)")
	flag.Float64Var(&config.Seconds, "seconds", 0, "how long a sample takes, and smaller fixed sizes (default 1.5, with -short 0.7)")
	flag.StringVar(&config.README, "readme", "", "page that gets a summary between its marks")
	flag.StringVar(&cases, "cases", "", "names of cases, separated by commas (default all); \"list\" lists them")
	flag.StringVar(&contenders, "contenders", "", "those that take part, separated by commas: floor, ours, celery (default all)")
	flag.StringVar(&config.Folder, "out", "docs/benchmarks", "folder for the report")
	flag.Parse()
	if cases == "list" {
		bench.List(os.Stdout)
		return nil
	}
	if cases != "" {
		config.Cases = strings.Split(cases, ",")
	}
	if contenders != "" {
		config.Contenders = strings.Split(contenders, ",")
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	return bench.Run(ctx, config)
}

func compete(name string) error {
	spec, err := contender.FromEnvironment()
	if err != nil {
		return err
	}
	return contender.Run(name, spec)
}
