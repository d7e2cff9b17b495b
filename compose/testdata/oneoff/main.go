// Command oneoff is the program of the containers that run one command in tests. It
// prints what it finds in the file /login/who, and ends with the code of its argument;
// with the argument hang it ends by a signal only.
package main

import (
	"fmt"
	"os"
	"strconv"
	"syscall"
	"time"
)

func main() {
	who, err := os.ReadFile("/login/who")
	fmt.Fprintf(os.Stderr, "Logged in as %s, %v\n", who, err)
	err = os.WriteFile("/login/who", nil, 0o600)
	fmt.Printf("HOME=%s, written: %t, read-only: %t\n", os.Getenv("HOME"), err == nil, err != nil && err.(*os.PathError).Err == syscall.EROFS)
	if os.Args[1] == "hang" {
		time.Sleep(time.Hour)
	}
	code, err := strconv.Atoi(os.Args[1])
	if err != nil {
		panic(err)
	}
	os.Exit(code)
}
