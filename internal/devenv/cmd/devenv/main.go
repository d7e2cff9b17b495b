// Command devenv starts the services that tests and the demo need.
//
//	devenv up                  start what is missing, leave it running, print export lines
//	devenv down                end what up has left running
//	devenv run -- COMMAND…     start what is missing, run COMMAND, end what was started
//
// up and run accept -newest (the newest RabbitMQ and PostgreSQL, as containers),
// -images (also the images of docker-compose.yaml), -only PART,PART and
// -celery RELEASE,RELEASE. The exit code of run is that of COMMAND, or 125 if a
// service cannot be started.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
)

const (
	exitUsage   = 2
	exitNoSetUp = 125
	// stopTimeout is the time between a signal to COMMAND and SIGKILL.
	stopTimeout = 20 * time.Second
)

func main() {
	if len(os.Args) == 2 && os.Args[1] == devenv.GuardVerb {
		guard()
		return
	}
	os.Exit(dispatch(os.Args[1:]))
}

// guard ignores the signals that end its parent, since it must outlive that.
func guard() {
	signal.Ignore(syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	if err := devenv.Guard(os.Stdin); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func dispatch(args []string) int {
	flags := flag.NewFlagSet("devenv", flag.ContinueOnError)
	flags.Usage = func() {
		fmt.Fprintln(flags.Output(), "usage: devenv up|down|run [-newest] [-images] [-only PART,PART] [-celery RELEASE,RELEASE] [-- COMMAND…]")
		flags.PrintDefaults()
	}
	config := devenv.Config{Output: os.Stderr}
	flags.BoolVar(&config.Newest, "newest", false, "the newest RabbitMQ and PostgreSQL, as containers")
	flags.BoolVar(&config.Images, "images", false, "also the images of docker-compose.yaml")
	flags.Func("only", "the parts to bring up, separated by commas: engine, compose, python, broker, database, compiler", func(text string) error {
		config.Only = strings.Split(text, ",")
		return config.Validate()
	})
	flags.Func("celery", "the Celery releases to make Python environments of, separated by commas (default all)", func(text string) error {
		config.Celeries = strings.Split(text, ",")
		return config.Validate()
	})
	verb := ""
	if len(args) > 0 {
		verb, args = args[0], args[1:]
	}
	if err := flags.Parse(args); err != nil {
		return exitUsage
	}
	command := flags.Args()
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)

	switch {
	case verb == "up" && len(command) == 0:
		config.Keep = true
		go cancelOn(signals, cancel)
		environment, err := devenv.Up(ctx, config)
		if err != nil {
			return refuse(err)
		}
		fmt.Print(environment.Exports())
		return 0
	case verb == "down" && len(command) == 0:
		ended, err := devenv.Down()
		if err != nil {
			return refuse(err)
		}
		fmt.Fprintf(os.Stderr, "%d servers ended\n", ended)
		return 0
	case verb == "run" && len(command) > 0:
		return run(ctx, cancel, signals, config, command)
	}
	flags.Usage()
	return exitUsage
}

func cancelOn(signals <-chan os.Signal, cancel context.CancelCauseFunc) {
	cancel(fmt.Errorf("stopped by signal: %s", <-signals))
}

func refuse(err error) int {
	if errors.Is(err, context.Canceled) {
		fmt.Fprintln(os.Stderr, "devenv: stopped; nothing is left running")
	} else {
		fmt.Fprintln(os.Stderr, "devenv:", err)
	}
	return exitNoSetUp
}

func run(ctx context.Context, cancel context.CancelCauseFunc, signals chan os.Signal, config devenv.Config, command []string) (code int) {
	up, stopUp := context.WithCancel(ctx)
	defer stopUp()
	ready := make(chan struct{})
	heard := make(chan struct{})
	go func() {
		defer close(heard)
		select {
		case s := <-signals:
			cancel(fmt.Errorf("stopped by signal: %s", s))
		case <-ready:
		}
	}()
	environment, err := devenv.Up(up, config)
	close(ready)
	<-heard
	if err != nil {
		return refuse(err)
	}
	defer func() {
		if err := environment.Close(); err != nil {
			fmt.Fprintln(os.Stderr, "devenv:", err)
			code = exitNoSetUp
		}
	}()
	if ctx.Err() != nil {
		return refuse(ctx.Err())
	}

	cmd := exec.Command(command[0], command[1:]...)
	cmd.Env = append(os.Environ(), environment.Vars()...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = input(), os.Stdout, os.Stderr
	err = environment.Run(cmd, signals, stopTimeout)
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit) && exit.Exited():
		return exit.ExitCode()
	case errors.As(err, &exit):
		return 128 + int(exit.Sys().(syscall.WaitStatus).Signal())
	}
	fmt.Fprintf(os.Stderr, "devenv: %v\n", err)
	return 127
}

// input returns the standard input for COMMAND, or nil if it is a terminal:
// COMMAND runs in a background process group, which the terminal would stop when
// it reads.
func input() io.Reader {
	if info, err := os.Stdin.Stat(); err != nil || info.Mode()&os.ModeCharDevice != 0 {
		return nil
	}
	return os.Stdin
}
