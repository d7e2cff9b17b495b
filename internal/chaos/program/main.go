// Command program runs a chaos campaign, or the proof that campaigns find known
// defects. `make chaos` and `make chaos-proof` start it with servers.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/chaos"
)

func main() { os.Exit(run()) }

func run() int {
	config := chaos.Config{Module: ".", Output: os.Stdout}
	var kinds, defects string
	var minutes float64
	var proof bool
	flag.Uint64Var(&config.Seed, "seed", 0, "seed of the trials; 0 draws one")
	flag.IntVar(&config.Trials, "n", 0, "number of trials; 0 is enough for a kill at each place where a worker can be killed, or no limit with -minutes")
	flag.IntVar(&config.Only, "trial", -1, "run only this trial")
	flag.IntVar(&config.Lanes, "lanes", 0, "trials at once (default 8)")
	flag.IntVar(&config.Runs, "runs", 0, "how many runs a rush (default 200) or a mixed trial (default 100) publishes")
	flag.Float64Var(&minutes, "minutes", 0, "begin no trial after this time")
	flag.StringVar(&kinds, "kinds", "", "kinds of trials, in turn, separated by commas")
	flag.StringVar(&config.Folder, "folder", "", "folder for all files and the evidence of failed trials (default: a new one in var/chaos)")
	flag.StringVar(&defects, "defects", "", "with -proof: the names of defects, separated by commas (default: all)")
	flag.BoolVar(&proof, "proof", false, "plant known defects and check that each is found")
	flag.Parse()
	config.For = time.Duration(minutes * float64(time.Minute))
	if config.For > 0 && config.Trials == 0 {
		config.Trials = 1 << 30
	}
	if config.Seed == 0 {
		config.Seed = rand.Uint64N(1 << 32)
	}
	for kind := range strings.SplitSeq(kinds, ",") {
		if kind != "" {
			config.Kinds = append(config.Kinds, chaos.Kind(kind))
		}
	}
	for name := range strings.SplitSeq(defects, ",") {
		if name != "" {
			config.Defects = append(config.Defects, name)
		}
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := campaign(ctx, config, proof); err != nil {
		fmt.Fprintln(os.Stderr, "chaos:", err)
		return 1
	}
	return 0
}

func campaign(ctx context.Context, config chaos.Config, proof bool) error {
	if config.Folder == "" {
		if err := os.MkdirAll("var/chaos", 0o755); err != nil {
			return err
		}
		folder, err := os.MkdirTemp("var/chaos", time.Now().UTC().Format("20060102-150405-"))
		if err != nil {
			return err
		}
		config.Folder = folder
	}
	// Absolute, because programs run in other folders.
	folder, err := filepath.Abs(config.Folder)
	if err != nil {
		return err
	}
	config.Folder = folder
	if proof {
		return chaos.Prove(ctx, config)
	}
	fmt.Printf("seed %d; all files are in %s\n", config.Seed, config.Folder)
	report, err := chaos.Run(ctx, config)
	if err != nil {
		return err
	}
	report.Print(os.Stdout)
	if n := report.Problems(); n > 0 {
		return fmt.Errorf("%d problems found", n)
	}
	if report.Interrupted() {
		return errors.New("interrupted")
	}
	return nil
}
