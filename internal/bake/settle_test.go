// SPDX-License-Identifier: Apache-2.0

package bake

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/labfile/lab/internal/guest"
)

// hung is a guest that never answers.
type hung struct{}

func (hung) Run(ctx context.Context, _ guest.Command) error {
	<-ctx.Done()
	return guest.ErrDisconnected
}

func TestSettlingIsLimited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		err := (&Machine{Guest: hung{}}).Settle(ctx)
		if want := "the guest stopped answering; lab waited 13m"; err == nil || err.Error() != want || time.Since(began) != settleTime {
			t.Errorf("after %s: got %v, want %s", time.Since(began), err, want)
		}
		why := errors.New("Ctrl-C")
		ctx, stop := context.WithCancelCause(t.Context())
		stop(why)
		if err := (&Machine{Guest: hung{}}).Settle(ctx); !errors.Is(err, guest.ErrDisconnected) {
			t.Errorf("interrupted: got %v", err)
		}
	})
}

func TestSettlingNeedsRoot(t *testing.T) {
	for _, tt := range []struct{ name, sudo, want string }{
		{"no password", "echo 'sudo: a password is required' >&2; exit 1", `the user "bob" cannot become root there: sudo: a password is required`},
		{"silent", "exit 1", `the user "bob" cannot become root there: exit code 1`},
		{"sudo", "exit 0", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, "sudo"), []byte("#!/bin/sh\n"+tt.sudo+"\n"), 0o700); err != nil {
				t.Fatal(err)
			}
			t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
			err := (&Machine{Guest: here{}, User: "bob", Sudo: true}).Settle(t.Context())
			if tt.want == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			var hint interface{ Hint() string }
			if err == nil || err.Error() != tt.want || !errors.As(err, &hint) || !strings.Contains(hint.Hint(), `sudo without a password for the user "bob"`) {
				t.Errorf("got %v, want %s and the next step", err, tt.want)
			}
			var exit *guest.ExitError
			if errors.As(err, &exit) {
				t.Error("the exit code of sudo would be that of lab")
			}
		})
	}
}
