// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/labfile/lab/internal/guest/agentapi"
)

// ListFiles writes the list of all files of the guest's root file system to w, in the
// form that drift.ReadManifest reads: by the agent, or by the guest's own programs.
func ListFiles(ctx context.Context, t Target, w io.Writer) error {
	if t.Agent != nil {
		err := listByAgent(ctx, t, w)
		var refused *RefusedError
		if !errors.As(err, &refused) { // an agent of a box that was built by an earlier lab
			return err
		}
	}
	client, err := ConnectRoot(ctx, t)
	if err != nil {
		return err
	}
	defer client.Close()
	if err := client.run(ctx, listProgram, w); err != nil {
		return fmt.Errorf("listing the files of machine %q: %w", t.Machine, err)
	}
	return nil
}

func listByAgent(ctx context.Context, t Target, w io.Writer) error {
	conn, err := t.Agent(ctx)
	if err != nil {
		return fmt.Errorf("reaching the agent of machine %q: %w", t.Machine, err)
	}
	defer conn.Close()
	if err := agentapi.Begin(ctx, conn, agentapi.Files); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	if _, err := io.Copy(w, conn); err != nil {
		return fmt.Errorf("listing the files of machine %q: %w", t.Machine, errors.Join(context.Cause(ctx), err))
	}
	return nil
}

// RootClient is a login that runs programs as root.
type RootClient struct {
	*Client
	before []string
}

// ConnectRoot logs in as root, or as a user who may become root without a password.
func ConnectRoot(ctx context.Context, t Target) (*RootClient, error) {
	c := &RootClient{}
	switch {
	case t.Agent != nil:
		t.User = "root" // the agent lets the lab in as root on every box
	case t.User != "root":
		c.before = []string{"sudo", "-n", "--"}
	}
	var err error
	c.Client, err = Connect(ctx, t)
	return c, err
}

// ReadFile writes at most limit bytes of a file to w.
func (c *RootClient) ReadFile(ctx context.Context, w io.Writer, path string, limit int64) error {
	return c.run(ctx, `[ -f "$1" ] && [ ! -L "$1" ] || { echo "it is no file any more" >&2; exit 1; }; exec head -c "$2" "$1"`, w, path, fmt.Sprint(limit))
}

// run runs a program of the guest's sh. What it complains about becomes the error.
func (c *RootClient) run(ctx context.Context, program string, w io.Writer, args ...string) error {
	said := &tail{}
	argv := append(append([]string{}, c.before...), "sh", "-c", program, "lab")
	err := c.Run(ctx, Command{Args: append(argv, args...), Stdout: w, Stderr: said})
	if text := strings.TrimSpace(said.String()); err != nil && text != "" {
		return fmt.Errorf("%s (%w)", text, err)
	}
	return err
}

// listProgram needs GNU find, or the find and stat of busybox. Files that come and go
// meanwhile are passed over; that the end is there says that the rest is.
const listProgram = `export LC_ALL=C
if find / -maxdepth 0 -printf '' 2>/dev/null; then
	printf 'lab-manifest 1\0'
	find / -xdev ! -type b ! -type c -printf '%y %m %U %G %s %T@ %C@ %i %n %D 0\0%l\0%p\0' 2>/dev/null
	find / -xdev -type b -exec stat --printf 'b %a %u %g %s %.9Y %.9Z %i %h %d %t:%T\0\0%n\0' {} + 2>/dev/null
	find / -xdev -type c -exec stat --printf 'c %a %u %g %s %.9Y %.9Z %i %h %d %t:%T\0\0%n\0' {} + 2>/dev/null
elif stat -c %f / >/dev/null 2>&1 && find / -prune -xdev >/dev/null 2>&1; then
	printf 'lab-manifest 1 seconds\0'
	s=$(printf '\001')
	find / -xdev -exec stat -c "x%f - %u %g %s %Y %Z %i %h %d %t:%T$s%N$s%n$s" {} + 2>/dev/null | tr '\001' '\000'
else
	echo "it has neither GNU find nor the stat of busybox" >&2
	exit 1
fi
printf 'end\0'
`
