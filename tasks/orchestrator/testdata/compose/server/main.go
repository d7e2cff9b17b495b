// Command server is the service of the compose tests. The first word of the
// file /behaviour says what it does: ok, unhealthy (answers, but fails its
// health check), exit, or done (ends without an error).
package main

import (
	"cmp"
	"fmt"
	"net/http"
	"os"
	"strings"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == "check" {
		response, err := http.Get("http://127.0.0.1:8080/check")
		if err != nil || response.StatusCode != http.StatusOK {
			os.Exit(1)
		}
		return
	}
	text, err := os.ReadFile("/behaviour")
	if err != nil {
		fmt.Println(err)
		os.Exit(2)
	}
	behaviour, version, _ := strings.Cut(strings.TrimSpace(string(text)), " ")
	if behaviour == "exit" {
		fmt.Println("No module named 'flask'")
		os.Exit(3)
	}
	if behaviour == "done" {
		return
	}
	http.HandleFunc("/health", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, version) })
	http.HandleFunc("/check", func(w http.ResponseWriter, _ *http.Request) {
		if behaviour == "unhealthy" {
			http.Error(w, "unhealthy", http.StatusInternalServerError)
		}
	})
	fmt.Println(http.ListenAndServe(":"+cmp.Or(os.Getenv("PORT"), "8080"), nil))
}
