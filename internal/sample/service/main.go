// Command service is the program in the containers of the sample projects: a web
// service that fails with a message if its dependency is missing. It is linked
// statically, so that its image needs no base.
//
//	service install FILE   for the image build: print what would be installed
//	service serve FILE     serve /health on port 8080
//	service check          exit with code 0 if /health of this container answers 200
//
// FILE is a requirements.txt. Without a line for flask the service fails with
// Python's error message. With a line "unhealthy" it runs and /health answers
// 503.
package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"
)

const address = ":8080"

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(args []string) error {
	switch {
	case len(args) == 2 && args[0] == "install":
		packages, err := requirements(args[1])
		if err != nil {
			return err
		}
		fmt.Println("Successfully installed", strings.Join(packages, " "))
		return nil
	case len(args) == 2 && args[0] == "serve":
		packages, err := requirements(args[1])
		if err != nil {
			return err
		}
		return serve(packages)
	case len(args) == 1 && args[0] == "check":
		return check()
	}
	return errors.New("usage: service install FILE | serve FILE | check")
}

// requirements returns the lines of a requirements.txt without comments and
// empty lines.
func requirements(path string) ([]string, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	var packages []string
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		line := strings.TrimSpace(lines.Text())
		if line != "" && !strings.HasPrefix(line, "#") {
			packages = append(packages, line)
		}
	}
	return packages, lines.Err()
}

func serve(packages []string) error {
	status := http.StatusOK
	found := false
	for _, line := range packages {
		name, _, _ := strings.Cut(line, "==")
		found = found || name == "flask"
		if name == "unhealthy" {
			status = http.StatusServiceUnavailable
		}
	}
	if !found {
		return errors.New("ModuleNotFoundError: No module named 'flask'")
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /health", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(status) })
	server := &http.Server{Addr: address, Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	context.AfterFunc(ctx, func() { server.Close() })
	fmt.Println("listening on", address)
	if err := server.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

func check() error {
	client := &http.Client{Timeout: 2 * time.Second}
	response, err := client.Get("http://127.0.0.1" + address + "/health")
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("health: %s", response.Status)
	}
	return nil
}
