package devenv

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"
)

// databaseLimit is the limit on the time from PostgreSQL's start to its first
// answer. Usual are less than 1 s for a process and 3 s for a container.
const databaseLimit = time.Minute

// findPostgreSQL returns the folder of initdb and postgres of the newest
// installed version, or "".
func findPostgreSQL() string {
	best, bestVersion := "", 0
	folders, _ := filepath.Glob("/usr/lib/postgresql/*/bin")
	for _, folder := range folders {
		version, err := strconv.Atoi(filepath.Base(filepath.Dir(folder)))
		_, statErr := os.Stat(filepath.Join(folder, "initdb"))
		if err == nil && statErr == nil && version > bestVersion {
			best, bestVersion = folder, version
		}
	}
	if best == "" {
		if path, err := exec.LookPath("initdb"); err == nil {
			best = filepath.Dir(path)
		}
	}
	return best
}

// database finds or starts PostgreSQL.
func (b *startup) database(ctx context.Context) error {
	// Tests start PgBouncer themselves, see Pooler.
	if err := b.debian.wait(ctx, "pgbouncer"); err != nil {
		return err
	}
	if b.given(EnvDatabase) {
		return nil
	}
	if err := b.debian.wait(ctx, "postgresql"); err != nil {
		return err
	}
	if folder := findPostgreSQL(); folder != "" && !b.Newest {
		return b.databaseProcess(ctx, folder)
	}
	return b.databaseContainer(ctx)
}

func (b *startup) databaseProcess(ctx context.Context, programs string) error {
	w := b.progress.start("starting", "postgres")
	defer w.failed()
	account, err := unprivileged("postgres") // it refuses to run as root
	if err != nil {
		return err
	}
	home := filepath.Join(b.dir, "postgres")
	if err := ownFolder(home, account); err != nil {
		return err
	}
	password := randomHex()
	passwordFile := filepath.Join(home, "password")
	if err := os.WriteFile(passwordFile, []byte(password+"\n"), 0o600); err != nil {
		return err
	}
	if account != nil {
		if err := os.Chown(passwordFile, int(account.Uid), int(account.Gid)); err != nil {
			return err
		}
	}
	data := filepath.Join(home, "data")
	environment := []string{"PATH=" + programs + ":/usr/bin:/bin", "LANG=C.UTF-8", "HOME=" + home}
	initdb := exec.Command(filepath.Join(programs, "initdb"), "-D", data, "-U", "mm",
		"--pwfile="+passwordFile, "-A", "scram-sha-256", "-E", "UTF8", "--no-locale", "-N")
	initdb.Env, initdb.Dir = environment, home
	runAs(initdb, account)
	if err := b.run(ctx, w, initdb); err != nil {
		return err
	}
	for attempt := 1; ; attempt++ {
		ports, err := FreePorts(1)
		if err != nil {
			return err
		}
		port := ports[0]
		// The data is deleted at the end, so nothing is synced to disk.
		postgres := exec.Command(filepath.Join(programs, "postgres"), "-D", data, "-p", strconv.Itoa(port),
			"-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=",
			"-c", "fsync=off", "-c", "synchronous_commit=off", "-c", "full_page_writes=off",
			"-c", "shared_buffers=64MB", "-c", "max_connections=300")
		postgres.Env, postgres.Dir = environment, home
		runAs(postgres, account)
		server, err := b.serve(fmt.Sprintf("postgres-%d", attempt), postgres, b.guard.watchGroup)
		if err != nil {
			return err
		}
		address := databaseURL(port, password)
		version, err := databaseAnswers(ctx, address, server.exited)
		if err == nil {
			b.export(EnvDatabase, address)
			w.done(fmt.Sprintf("postgres %s (127.0.0.1:%d)", version, port))
			return nil
		}
		if !server.portTaken() || attempt == 3 {
			return server.explain(fmt.Errorf("postgres does not answer after its start: %w", err))
		}
	}
}

func (b *startup) databaseContainer(ctx context.Context) error {
	if err := b.waitEngine(ctx); err != nil {
		if b.Newest {
			return fmt.Errorf("the newest PostgreSQL runs in a container: %w", err)
		}
		return fmt.Errorf("PostgreSQL is not installed, and docker cannot run it: %w; %s", err, installHint("postgresql"))
	}
	find, wanted := b.image, postgresImage
	if b.Newest {
		find, wanted = b.newestImage, newestPostgresImage
	}
	image, err := find(ctx, wanted)
	if err != nil {
		return fmt.Errorf("%w; %s", err, installHint("postgresql"))
	}
	w := b.progress.start("starting", image)
	defer w.failed()
	watch, stopWatch := context.WithCancel(ctx)
	defer stopWatch()
	password := randomHex()
	name, ports, err := b.container(ctx, "postgres", image, map[string]string{
		"POSTGRES_USER": "mm", "POSTGRES_PASSWORD": password, "POSTGRES_DB": "postgres",
	}, 5432)
	if err != nil {
		return err
	}
	address := databaseURL(ports[0], password)
	version, err := databaseAnswers(ctx, address, containerExited(watch, name))
	if err != nil {
		return explainContainer(name, fmt.Errorf("postgres does not answer after its start: %w", err))
	}
	b.export(EnvDatabase, address)
	b.export(EnvDatabaseImage, image)
	w.done(fmt.Sprintf("postgres %s (127.0.0.1:%d, image %s)", version, ports[0], image))
	return nil
}

func databaseURL(port int, password string) string {
	address := url.URL{Scheme: "postgres", User: url.UserPassword("mm", password),
		Host: fmt.Sprintf("127.0.0.1:%d", port), Path: "/postgres"}
	return address.String()
}

// databaseAnswers waits for the server and returns its version.
func databaseAnswers(ctx context.Context, address string, exited <-chan struct{}) (version string, err error) {
	err = until(ctx, databaseLimit, exited, func(ctx context.Context) error {
		attempt, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		conn, err := pgx.Connect(attempt, address)
		if err != nil {
			return err
		}
		defer conn.Close(attempt)
		var number int
		if err := conn.QueryRow(attempt, "SELECT current_setting('server_version_num')::int").Scan(&number); err != nil {
			return err
		}
		version = fmt.Sprintf("%d.%d", number/10000, number%10000)
		return nil
	})
	return version, err
}

func dial(ctx context.Context, port int) error {
	return dialHost(ctx, fmt.Sprintf("127.0.0.1:%d", port))
}

func dialHost(ctx context.Context, address string) error {
	dialer := net.Dialer{Timeout: 2 * time.Second}
	conn, err := dialer.DialContext(ctx, "tcp", address)
	if err != nil {
		return err
	}
	return conn.Close()
}

// randomHex is a password or a name's suffix.
func randomHex() string {
	b := make([]byte, 8)
	rand.Read(b) // never fails
	return hex.EncodeToString(b)
}
