// Command idle is the service of the helper's tests. It runs until a signal ends
// it. With the file /fails, which an image may have, it exits at once.
package main

import (
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	if _, err := os.Stat("/fails"); err == nil {
		fmt.Println("this version does not start")
		os.Exit(3)
	}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM)
	<-signals
}
