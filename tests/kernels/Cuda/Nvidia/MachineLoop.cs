namespace Rollout.Kernels.Tests.Cuda;

/// <summary>A natural loop of a kernel's code: all that can reach a branch back to an instruction that every way to it passes.</summary>
/// <param name="Depth">1 for a loop within no other.</param>
/// <param name="Instructions">Of the whole loop, loops within it included, each counted once.</param>
/// <param name="IsInner">Whether no other loop is within it.</param>
/// <param name="Operations">Counts of its notable operations, by name.</param>
internal sealed record MachineLoop(int Depth, int Instructions, bool IsInner, IReadOnlyDictionary<string, int> Operations)
{
    // Tensor cores, asynchronous copies, memory, special functions, barriers.
    private static readonly string[] s_shown = ["HMMA", "LDGSTS", "LDSM", "LDG", "LDS", "STS", "STG", "MUFU", "SHFL", "BAR"];

    public override string ToString() => $"{Depth}:{Instructions}{(IsInner ? "" : "+")}" + (Operations.Count == 0
        ? ""
        : $"({string.Join(' ', Operations.Select(operation => $"{operation.Key} {operation.Value}"))})");

    /// <summary>All of them, by the address of their first instruction.</summary>
    public static MachineLoop[] Find(Instruction[] code)
    {
        Dictionary<int, int> places = [];
        for (int i = 0; i < code.Length; i++)
            places[code[i].Address] = i;
        int[][] next = new int[code.Length][];
        for (int i = 0; i < code.Length; i++)
        {
            int? target = code[i].Target is { } address && places.TryGetValue(address, out int place) ? place : null;
            bool falls = code[i].FallsThrough && i + 1 < code.Length;
            next[i] = (falls, target) switch
            {
                (true, { } to) => [i + 1, to],
                (true, null) => [i + 1],
                (false, { } to) => [to],
                _ => [],
            };
        }

        // Loops with one first instruction are one loop.
        int[] dominators = Dominators(next, out int[] rank, out List<int>[] previous);
        SortedDictionary<int, HashSet<int>> bodies = [];
        for (int i = 0; i < code.Length; i++)
        {
            foreach (int first in next[i].Where(to => dominators[i] >= 0 && rank[to] <= rank[i] && Dominates(to, i)))
            {
                if (!bodies.TryGetValue(first, out HashSet<int>? body))
                    bodies[first] = body = [first];
                Stack<int> open = new([i]);
                while (open.TryPop(out int at))
                {
                    if (body.Add(at))
                        previous[at].ForEach(open.Push);
                }
            }
        }

        return [.. bodies.Select(loop => Describe(loop.Key, loop.Value))];

        MachineLoop Describe(int first, HashSet<int> body)
        {
            int depth = bodies.Values.Count(other => other.Contains(first));
            bool isInner = bodies.Keys.Count(body.Contains) == 1;
            IEnumerable<KeyValuePair<string, int>> operations =
                s_shown.Select(name => KeyValuePair.Create(name, body.Count(i => code[i].Is(name))));
            return new MachineLoop(depth, body.Count, isInner, operations.Where(operation => operation.Value > 0).ToDictionary());
        }

        bool Dominates(int first, int at)
        {
            while (rank[at] > rank[first])
                at = dominators[at];
            return at == first;
        }
    }

    /// <summary>
    /// By instruction the nearest that every way to it passes (Cooper, Harvey, Kennedy 2001); -1 for unreachable instructions.
    /// </summary>
    /// <param name="next">By instruction those that may run after it.</param>
    /// <param name="rank">By instruction its place in an order that has a loop's first instruction before the others.</param>
    /// <param name="previous">By instruction those that may run before it.</param>
    private static int[] Dominators(int[][] next, out int[] rank, out List<int>[] previous)
    {
        List<int> order = [];
        bool[] seen = new bool[next.Length];
        Stack<(int At, int Next)> open = new([(0, 0)]);
        seen[0] = true;
        while (open.TryPop(out (int At, int Next) top))
        {
            if (top.Next == next[top.At].Length)
            {
                order.Add(top.At);
                continue;
            }

            open.Push((top.At, top.Next + 1));
            int to = next[top.At][top.Next];
            if (!seen[to])
            {
                seen[to] = true;
                open.Push((to, 0));
            }
        }

        order.Reverse();
        int[] dominators = new int[next.Length], ranks = rank = new int[next.Length];
        Array.Fill(dominators, -1);
        previous = [.. next.Select(_ => new List<int>())];
        for (int i = 0; i < order.Count; i++)
        {
            rank[order[i]] = i;
            foreach (int to in next[order[i]])
                previous[to].Add(order[i]);
        }

        dominators[0] = 0;
        for (bool changed = true; changed;)
        {
            changed = false;
            foreach (int at in order.Skip(1))
            {
                int nearest = -1;
                foreach (int from in previous[at].Where(from => dominators[from] >= 0))
                    nearest = nearest < 0 ? from : Meet(nearest, from);
                changed |= dominators[at] != nearest;
                dominators[at] = nearest;
            }
        }

        return dominators;

        int Meet(int a, int b)
        {
            while (a != b)
            {
                while (ranks[a] > ranks[b])
                    a = dominators[a];
                while (ranks[b] > ranks[a])
                    b = dominators[b];
            }

            return a;
        }
    }
}
