// Command service is the service of the tests of verify. Its environment says how
// it behaves. Without any, it answers every request with 200 at port 8080.
//
//	PORT, LISTEN    port, and address, to listen at
//	STARTUP         time before it listens
//	LIFE, EXIT      time after which it ends, and its exit code
//	CRASHES         how many starts end so; 0 is all of them
//	ANSWERS         number of answers after which it ends
//	STATUS          statuses of its answers, in order, the last one for good; 503x4
//	                is four of them; "loop" in front begins again
//	WARM            age of the process up to which it answers 503
//	FLAP            answers 503 in every second period of this length
//	DELAY           time before an answer
//	MODE            see serve
//	CHECK           exit codes of its health check, as STATUS
//	CHECKDELAY      time that a health check takes
//	MEMORY          takes memory until it is killed, after LIFE
package main

import (
	"bufio"
	"cmp"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == "check" {
		time.Sleep(span("CHECKDELAY"))
		code := at(os.Getenv("CHECK"), count("/checks"))
		fmt.Printf("health check ends with %d\n", code)
		os.Exit(code)
	}
	if len(os.Args) > 1 && os.Args[1] == "sleep" {
		time.Sleep(time.Hour)
	}
	start, starts := time.Now(), count("/starts")+1
	fmt.Println("start", starts)
	crashes, _ := strconv.Atoi(os.Getenv("CRASHES"))
	if life := span("LIFE"); os.Getenv("LIFE") != "" && (crashes == 0 || starts <= crashes) {
		go func() {
			time.Sleep(life)
			end()
		}()
	}
	time.Sleep(span("STARTUP"))
	listener, err := net.Listen("tcp", net.JoinHostPort(os.Getenv("LISTEN"), cmp.Or(os.Getenv("PORT"), "8080")))
	if err != nil {
		fmt.Println(err)
		os.Exit(2)
	}
	serve(listener, start)
}

func end() {
	if os.Getenv("MEMORY") != "" {
		var all [][]byte
		for {
			block := make([]byte, 1<<20)
			for i := range block {
				block[i] = byte(i)
			}
			all = append(all, block)
		}
	}
	code, err := strconv.Atoi(os.Getenv("EXIT"))
	if err != nil {
		code = 1
	}
	fmt.Println("No module named 'flask'")
	os.Exit(code)
}

// count returns how often it was called with this file before, in any process.
func count(file string) int {
	data, _ := os.ReadFile(file)
	n, _ := strconv.Atoi(string(data))
	_ = os.WriteFile(file, []byte(strconv.Itoa(n+1)), 0o644)
	return n
}

// at returns the number at an index of a sequence.
func at(sequence string, index int) int {
	sequence, again := strings.CutPrefix(sequence, "loop ")
	var all []int
	for _, word := range strings.Fields(sequence) {
		number, times, _ := strings.Cut(word, "x")
		n, _ := strconv.Atoi(number)
		repeat, err := strconv.Atoi(times)
		if err != nil {
			repeat = 1
		}
		for range repeat {
			all = append(all, n)
		}
	}
	switch {
	case len(all) == 0:
		return 0
	case again:
		return all[index%len(all)]
	}
	return all[min(index, len(all)-1)]
}

func span(name string) time.Duration {
	d, _ := time.ParseDuration(os.Getenv(name))
	return d
}

var answers atomic.Int64

func serve(listener net.Listener, start time.Time) {
	mode := os.Getenv("MODE")
	switch mode {
	case "hang", "reset", "garbage", "headers", "body", "early", "old":
		for {
			c, err := listener.Accept()
			if err != nil {
				return
			}
			go raw(c, mode)
		}
	case "tls":
		listener = tls.NewListener(listener, &tls.Config{Certificates: []tls.Certificate{certificate()}})
	}
	limit, _ := strconv.ParseInt(os.Getenv("ANSWERS"), 10, 64)
	fmt.Println(http.Serve(listener, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		time.Sleep(span("DELAY"))
		n := answers.Add(1)
		status := cmp.Or(at(os.Getenv("STATUS"), int(n-1)), 200)
		if time.Since(start) < span("WARM") {
			status = 503
		}
		if flap := span("FLAP"); flap > 0 && int64(time.Since(start)/flap)%2 == 1 {
			status = 503
		}
		switch mode {
		case "head":
			if r.Method != http.MethodHead {
				status = 405
			}
		case "login":
			if user, password, _ := r.BasicAuth(); user != "u@x" || password != "p/w" {
				status = 401
			}
		case "query":
			if r.URL.RequestURI() != "/a%20b/%C3%A4?c=d%20e&f=%2f" {
				status = 400
			}
		case "hints":
			w.WriteHeader(http.StatusEarlyHints)
		case "redirect":
			if r.URL.Path != "/ok" {
				w.Header().Set("Location", "/ok")
				status = 302
			}
		}
		w.WriteHeader(status)
		switch mode {
		case "chunks":
			for range 5 {
				fmt.Fprintln(w, "chunk")
				w.(http.Flusher).Flush()
				time.Sleep(300 * time.Millisecond)
			}
		case "huge":
			block := make([]byte, 1<<16)
			for range 100 {
				_, _ = w.Write(block)
			}
		}
		if limit > 0 && n >= limit {
			w.(http.Flusher).Flush()
			go func() {
				time.Sleep(50 * time.Millisecond)
				end()
			}()
		}
	})))
}

// raw treats a connection otherwise than a server of HTTP does.
func raw(c net.Conn, mode string) {
	defer c.Close()
	if mode == "reset" {
		return
	}
	if mode == "hang" {
		time.Sleep(time.Hour)
	}
	if mode == "early" { // an answer before the end of the request
		fmt.Fprint(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
		return
	}
	if _, err := http.ReadRequest(bufio.NewReader(c)); err != nil {
		return
	}
	switch mode {
	case "garbage":
		fmt.Fprint(c, "SSH-2.0-OpenSSH_9.2\r\n")
	case "old":
		fmt.Fprint(c, "HTTP/1.0 200 OK\r\n\r\nwell")
	case "headers":
		fmt.Fprint(c, "HTTP/1.1 200 OK\r\n")
		for {
			if _, err := fmt.Fprint(c, "X-More: 1\r\n"); err != nil {
				return
			}
			time.Sleep(300 * time.Millisecond)
		}
	case "body":
		fmt.Fprint(c, "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n1")
		time.Sleep(time.Hour)
	}
}

func certificate() tls.Certificate {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		panic(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}
