// SPDX-License-Identifier: Apache-2.0

package cli

import "strings"

// nearest returns the name that word was probably meant to be, or nothing.
func nearest(word string, names []string) string {
	best, at := "", min((len(word)+2)/3+1, len(word))
	for _, n := range names {
		if d := distance(word, n); d < at {
			best, at = n, d
		}
	}
	if best == "" && len(word) >= 2 {
		for _, n := range names {
			if strings.HasPrefix(n, word) {
				return n
			}
		}
	}
	return best
}

// distance counts the insertions, deletions, replacements and swaps of
// neighbours between two words (optimal string alignment).
func distance(a, b string) int {
	if len(a) > 64 || len(b) > 64 {
		return 64
	}
	d := make([][]int, len(a)+1)
	for i := range d {
		d[i] = make([]int, len(b)+1)
		d[i][0] = i
	}
	for j := range d[0] {
		d[0][j] = j
	}
	for i := 1; i <= len(a); i++ {
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			d[i][j] = min(d[i-1][j]+1, d[i][j-1]+1, d[i-1][j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				d[i][j] = min(d[i][j], d[i-2][j-2]+1)
			}
		}
	}
	return d[len(a)][len(b)]
}
