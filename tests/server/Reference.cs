namespace Rollout.Server.Tests;

/// <summary>Log-probabilities from reference logits, in double precision.</summary>
internal static class Reference
{
    public static float[] LogSoftmax(float[] logits)
    {
        double most = logits.Max();
        double log = most + Math.Log(logits.Sum(value => Math.Exp(value - most)));
        return [.. logits.Select(value => (float)(value - log))];
    }

    /// <summary>Of tokens 1.., from the logits at the positions before them.</summary>
    public static float[] PromptLogProbs(float[][] logits, uint[] prompt)
        => [.. Enumerable.Range(1, prompt.Length - 1).Select(i => LogSoftmax(logits[i - 1])[prompt[i]])];
}
