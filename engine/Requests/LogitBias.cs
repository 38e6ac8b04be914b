namespace Rollout.Engine;

/// <summary>Values added to the logits of some tokens before temperature, in the form that a step needs: ids ascending.</summary>
internal sealed record LogitBias(int[] Ids, float[] Values)
{
    private static readonly LogitBias s_none = new([], []);

    public static LogitBias Of(IReadOnlyDictionary<int, float> biases, IReadOnlyList<int> forbidden)
    {
        if (biases.Count == 0 && forbidden.Count == 0) return s_none;
        SortedDictionary<int, float> all = [];
        foreach ((int id, float bias) in biases) all[id] = bias;
        foreach (int id in forbidden) all[id] = float.NegativeInfinity;
        return new LogitBias([.. all.Keys], [.. all.Values]);
    }
}
