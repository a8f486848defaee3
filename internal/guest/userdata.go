// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/textproto"
	"slices"
	"strings"

	"gopkg.in/yaml.v3"
)

const cloudConfig = "#cloud-config"

// files are the files of the seed.
func (c SeedConfig) files() ([]seedFile, error) {
	if len(c.UserData) > MaxUserData {
		return nil, fmt.Errorf("user data has %d bytes; at most %d are possible", len(c.UserData), MaxUserData)
	}
	meta, err := yaml.Marshal(map[string]any{
		"instance-id":    c.InstanceID,
		"local-hostname": c.Identity.Hostname,
	})
	if err != nil {
		return nil, err
	}
	user, err := c.userData()
	if err != nil {
		return nil, err
	}
	network, err := yaml.Marshal(c.network())
	if err != nil {
		return nil, err
	}
	return []seedFile{{"meta-data", meta}, {"user-data", user}, {"network-config", network}}, nil
}

// network is the network configuration, version 2. The address is fixed all the
// same: the lab's DHCP server knows the hardware address.
func (c SeedConfig) network() map[string]any {
	if c.AgentRuns || c.Identity.MAC == "" {
		return map[string]any{"config": "disabled"}
	}
	return map[string]any{
		"version": 2,
		"ethernets": map[string]any{
			"lab0": map[string]any{
				"match": map[string]any{"macaddress": c.Identity.MAC},
				"dhcp4": true,
			},
		},
	}
}

// ours is what cloud-init must do whatever the user data says.
func (c SeedConfig) ours() (map[string]any, error) {
	if c.AgentRuns {
		return map[string]any{"preserve_hostname": true, "ssh_deletekeys": false, "disable_root": false}, nil
	}
	key, err := ParseKey(c.Identity.HostKey)
	if err != nil {
		return nil, err
	}
	m := map[string]any{
		"hostname":            c.Identity.Hostname,
		"ssh_authorized_keys": anySlice(c.Identity.AuthorizedKeys),
		"ssh_deletekeys":      true, // those of the box are everybody's
		"ssh_genkeytypes":     []any{},
		"ssh_keys": map[string]any{
			"ed25519_private": string(key.PEM),
			"ed25519_public":  AuthorizedKey(key.Signer.PublicKey()),
		},
	}
	switch c.User {
	case "":
	case "root":
		m["disable_root"] = false
	default:
		// Renames the box's default user, or is its name already.
		m["user"] = map[string]any{"name": c.User}
	}
	return m, nil
}

func anySlice(s []string) []any {
	out := make([]any, len(s))
	for i, v := range s {
		out[i] = v
	}
	return out
}

// userData merges the user's data with ours: two cloud configurations become one,
// anything else is handed over side by side, ours last, which is what counts.
func (c SeedConfig) userData() ([]byte, error) {
	ours, err := c.ours()
	if err != nil {
		return nil, err
	}
	first, _, _ := strings.Cut(c.UserData, "\n")
	if strings.TrimSpace(c.UserData) == "" || strings.TrimSpace(first) == cloudConfig {
		theirs := map[string]any{}
		if err := yaml.Unmarshal([]byte(c.UserData), &theirs); err != nil {
			return nil, fmt.Errorf("reading user data: %w", err)
		}
		merge(theirs, ours)
		return config(theirs)
	}
	mime, err := mimeType(c.UserData)
	if err != nil {
		return nil, err
	}
	own, err := config(ours)
	if err != nil {
		return nil, err
	}
	// The boundary depends on the content, so that it can't stand in it.
	sum := sha256.Sum256([]byte(c.UserData))
	boundary := fmt.Sprintf("lab-%x", sum[:12])
	var b bytes.Buffer
	fmt.Fprintf(&b, "Content-Type: multipart/mixed; boundary=%q\nMIME-Version: 1.0\n\n", boundary)
	fmt.Fprintf(&b, "--%s\n", boundary)
	if mime != "" {
		fmt.Fprintf(&b, "Content-Type: %s; charset=\"utf-8\"\nMIME-Version: 1.0\nContent-Transfer-Encoding: 8bit\n\n", mime)
	}
	b.WriteString(strings.TrimSuffix(c.UserData, "\n"))
	fmt.Fprintf(&b, "\n--%s\nContent-Type: text/cloud-config; charset=\"utf-8\"\nMIME-Version: 1.0\nContent-Transfer-Encoding: 8bit\n\n", boundary)
	b.Write(own)
	fmt.Fprintf(&b, "--%s--\n", boundary)
	return b.Bytes(), nil
}

func config(m map[string]any) ([]byte, error) {
	b, err := yaml.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("writing user data: %w", err)
	}
	return append([]byte(cloudConfig+"\n"), b...), nil
}

// merge puts ours into theirs. Keys are added to theirs; a list of users that leaves
// out the default one gets it back, or lab could not log in; all else is replaced.
func merge(theirs, ours map[string]any) {
	for k, v := range ours {
		if k == "ssh_authorized_keys" {
			have, _ := theirs[k].([]any)
			v = append(slices.Clone(v.([]any)), have...)
		}
		theirs[k] = v
	}
	if users, ok := theirs["users"].([]any); ok && ours["ssh_keys"] != nil && !slices.Contains(users, any("default")) {
		theirs["users"] = append([]any{"default"}, users...)
	}
}

// mimeType tells what user data is from how it begins, as cloud-init does. It is
// empty for what is a MIME message already.
func mimeType(data string) (string, error) {
	for _, t := range []struct{ prefix, mime string }{
		{"#!", "text/x-shellscript"},
		{"#include-once", "text/x-include-once-url"},
		{"#include", "text/x-include-url"},
		{"#cloud-boothook", "text/cloud-boothook"},
		{"#cloud-config-archive", "text/cloud-config-archive"},
		{"#cloud-config-jsonp", "text/cloud-config-jsonp"},
		{"#part-handler", "text/part-handler"},
		{"## template: jinja", "text/jinja2"},
	} {
		if strings.HasPrefix(data, t.prefix) {
			return t.mime, nil
		}
	}
	name, _, _ := strings.Cut(data, ":")
	switch textproto.CanonicalMIMEHeaderKey(name) {
	case "Content-Type", "Mime-Version":
		return "", nil
	}
	return "", errors.New(`reading user data: it begins neither with "#cloud-config" nor with anything else that cloud-init knows`)
}
