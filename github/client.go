package github

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/address"
	"github.com/moonladderstudios/mm-orchestrator/internal/secret"
)

// Token is read before each request. *credential.Credential implements it.
type Token interface {
	Read(ctx context.Context) (secret.String, error)
}

// Config says which GitHub is asked, and how.
type Config struct {
	// API is the base address of the REST API; see [API]. Defaults to
	// https://api.github.com.
	API string
	// Token is sent with each request. Required.
	Token Token
	// HTTP has the transport. Defaults to one that uses the proxy variables of the
	// process.
	HTTP *http.Client
	// Timeout is how long one request may take, with its whole answer. Defaults to 30 s.
	Timeout time.Duration
	// Patience is how long one call may spend on waits for rate limits and on requests
	// that have failed. Defaults to 5 min; a negative value means that nothing is repeated.
	Patience time.Duration
	// Logger gets a line for each wait. Defaults to none.
	Logger *slog.Logger
	// Wait waits, or returns the cause of the context's end. Defaults to a timer.
	Wait func(ctx context.Context, pause time.Duration) error
	// Now defaults to time.Now.
	Now func() time.Time
}

// WithDefaults returns a copy in which empty fields have their defaults.
func (c Config) WithDefaults() Config {
	if c.API == "" {
		c.API = "https://api.github.com"
	}
	c.API = strings.TrimRight(c.API, "/")
	if c.HTTP == nil {
		c.HTTP = &http.Client{}
	}
	if c.Timeout == 0 {
		c.Timeout = 30 * time.Second
	}
	if c.Patience == 0 {
		c.Patience = 5 * time.Minute
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Wait == nil {
		c.Wait = wait
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	return c
}

func wait(ctx context.Context, pause time.Duration) error {
	timer := time.NewTimer(pause)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-timer.C:
		return nil
	}
}

// Validate returns an error that names what is wrong.
func (c Config) Validate() error {
	if c.Token == nil {
		return errors.New("github: Config.Token is nil")
	}
	if _, err := address.ParseServer(c.API); err != nil {
		return fmt.Errorf("github: Config.API: %w", err)
	}
	if c.Timeout < 0 {
		return fmt.Errorf("github: Config.Timeout is %s, want a positive duration", c.Timeout)
	}
	return nil
}

// A Client asks one GitHub. It may be used by several goroutines.
type Client struct {
	config Config
	base   *url.URL
	http   *http.Client
}

// New returns a Client, or an error of Validate. It asks nobody.
func New(config Config) (*Client, error) {
	config = config.WithDefaults()
	if err := config.Validate(); err != nil {
		return nil, err
	}
	base, err := address.ParseServer(config.API)
	if err != nil {
		return nil, err
	}
	own := *config.HTTP
	own.CheckRedirect, own.Jar, own.Timeout = SameServer, nil, 0
	return &Client{config: config, base: base, http: &own}, nil
}

// Close closes idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// With returns a client that sends this token, and reads none.
func (c *Client) With(token secret.String) *Client {
	other := *c
	other.config.Token = fixed{token}
	return &other
}

type fixed struct{ token secret.String }

func (f fixed) Read(context.Context) (secret.String, error) { return f.token, nil }

// errRedirect says that a redirect is not followed.
var errRedirect = errors.New("redirect")

// SameServer follows redirects to the same server only. net/http would keep the token
// for other ports and for subdomains.
func SameServer(request *http.Request, via []*http.Request) error {
	first := via[0]
	switch {
	case request.URL.Host != first.URL.Host || request.URL.Scheme != first.URL.Scheme:
		return fmt.Errorf("%w to %s, another server, to which the token is not sent", errRedirect, request.URL.Host)
	case request.Method != first.Method:
		return fmt.Errorf("%w of %s that would make it %s", errRedirect, first.Method, request.Method)
	case len(via) > 5:
		return fmt.Errorf("%w for the sixth time", errRedirect)
	}
	return nil
}
