// SPDX-License-Identifier: Apache-2.0

package local

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/labfile/lab/providers"
)

const (
	greeting = `{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": ""}, "capabilities": []}}` + "\n"
	stamp    = `{"timestamp": {"seconds": 1795410237, "microseconds": 0}, `
	powered  = stamp + `"event": "POWERDOWN"}` + "\n"
)

func shutdownEvent(reason string) string {
	return stamp + `"event": "SHUTDOWN", "data": {"guest": true, "reason": "` + reason + `"}}` + "\n"
}

func TestLastExit(t *testing.T) {
	at := time.Unix(1795410237, 0).UTC()
	status := func(ws unix.WaitStatus) *unix.WaitStatus { return &ws }
	killed := ExitRecord{Run: "r1", Reason: providers.ExitHost, Detail: "stopped by force", At: at}
	for _, c := range []struct {
		name   string
		events string
		log    string
		boot   string
		rec    ExitRecord
		ws     *unix.WaitStatus
		want   providers.Exit
		known  bool
	}{
		{
			name: "never came up", rec: ExitRecord{Run: "r0", Reason: providers.ExitPanic, At: at},
			want: providers.Exit{Reason: providers.ExitPanic, At: at}, known: true,
		},
		{
			name: "guest", events: greeting + shutdownEvent("guest-shutdown"),
			want: providers.Exit{Reason: providers.ExitGuest, Detail: "guest-shutdown", At: at}, known: true,
		},
		{
			name: "button", events: greeting + powered + shutdownEvent("guest-shutdown"),
			want: providers.Exit{Reason: providers.ExitHost, Detail: "guest-shutdown", At: at}, known: true,
		},
		{
			name: "panic", events: greeting + powered + shutdownEvent("guest-panic"),
			want: providers.Exit{Reason: providers.ExitPanic, Detail: "guest-panic", At: at}, known: true,
		},
		{
			name: "quit", events: greeting + shutdownEvent("host-qmp-quit"), rec: killed,
			want: providers.Exit{Reason: providers.ExitHost, Detail: "stopped by force", At: at}, known: true,
		},
		{
			name: "SIGTERM", events: greeting + shutdownEvent("host-signal"),
			want: providers.Exit{Reason: providers.ExitSignaled, Detail: "host-signal", At: at}, known: true,
		},
		{
			name: "the guest was faster than the kill", events: greeting + shutdownEvent("guest-panic"), rec: killed,
			want: providers.Exit{Reason: providers.ExitPanic, Detail: "guest-panic", At: at}, known: true,
		},
		{
			name: "SIGTERM by lab, through libvirt", events: greeting + shutdownEvent("host-signal"), rec: killed,
			want: providers.Exit{Reason: providers.ExitHost, Detail: "stopped by force", At: at}, known: true,
		},
		{
			name: "guest, under libvirt", events: greeting + shutdownEvent("guest-shutdown") + shutdownEvent("host-signal"),
			want: providers.Exit{Reason: providers.ExitGuest, Detail: "guest-shutdown", At: at}, known: true,
		},
		{
			name: "panic, under libvirt", events: greeting + powered + stamp + `"event": "GUEST_PANICKED", "data": {"action": "pause"}}` + "\n" + shutdownEvent("host-signal"),
			want: providers.Exit{Reason: providers.ExitPanic, Detail: "guest-panic", At: at}, known: true,
		},
		{
			name: "rebooted by libvirt, then killed", events: greeting + shutdownEvent("guest-shutdown") + stamp + `"event": "RESUME"}` + "\n", ws: status(9),
			want: providers.Exit{Reason: providers.ExitSignaled, Detail: "SIGKILL"}, known: true,
		},
		{
			name: "killed by lab", events: greeting, rec: killed, ws: status(9),
			want: providers.Exit{Reason: providers.ExitHost, Detail: "stopped by force", At: at}, known: true,
		},
		{
			name: "an older run was killed by lab", events: greeting, ws: status(9),
			rec:  ExitRecord{Run: "r0", Reason: providers.ExitHost, At: at},
			want: providers.Exit{Reason: providers.ExitSignaled, Detail: "SIGKILL"}, known: true,
		},
		{
			name: "segmentation fault", events: greeting, ws: status(11 | 128), log: "qemu: hm",
			want: providers.Exit{Reason: providers.ExitCrashed, Detail: "SIGSEGV: qemu: hm"}, known: true,
		},
		{
			name: "error exit", events: greeting, ws: status(1 << 8),
			want: providers.Exit{Reason: providers.ExitCrashed, Detail: "exit status 1"}, known: true,
		},
		{
			name: "host restarted", events: greeting, boot: "another",
			want: providers.Exit{Detail: "the host was restarted"}, known: true,
		},
		{
			name: "unseen, with last words", events: greeting, log: "Assertion failed",
			want: providers.Exit{Reason: providers.ExitCrashed, Detail: "Assertion failed"},
		},
		{
			name: "unseen", events: greeting,
			want: providers.Exit{Reason: providers.ExitSignaled, Detail: "killed"},
		},
		{
			name: "torn", events: "\x00\x00\x00" + greeting + shutdownEvent("guest-shutdown") + `{"timestamp": {"sec`,
			want: providers.Exit{Reason: providers.ExitGuest, Detail: "guest-shutdown", At: at}, known: true,
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			if c.boot == "" {
				c.boot = BootID()
			}
			if err := WriteJSON(filepath.Join(dir, FileRun), Run{ID: "r1", Boot: c.boot}); err != nil {
				t.Fatal(err)
			}
			if c.rec != (ExitRecord{}) {
				if err := WriteJSON(filepath.Join(dir, FileExit), c.rec); err != nil {
					t.Fatal(err)
				}
			}
			for name, text := range map[string]string{FileEvents + ".out": c.events} {
				if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			got, known := LastExit(dir, c.ws, func() string { return c.log })
			if got != c.want || known != c.known {
				t.Errorf("got %+v, %v\nwant %+v, %v", got, known, c.want, c.known)
			}
		})
	}
}
