namespace Rollout.Load.Bench;

/// <summary>One sample to draw.</summary>
/// <param name="Prompt">Token ids.</param>
/// <param name="MaxTokens">The exact length, so that every engine does the same work.</param>
/// <param name="At">Seconds from the start; not sent earlier.</param>
/// <param name="After">Index of a sample whose first token is waited for before this is sent, or -1.</param>
internal sealed record Arrival(int[] Prompt, int MaxTokens, double At = 0, int After = -1);

/// <summary>Which samples arrive when. The same seed gives the same list for every engine.</summary>
internal static class Arrivals
{
    private const int Vocabulary = 32768;

    /// <summary>A batch that starts together: <paramref name="batch"/> different prompts of 128 tokens, 64 tokens each.</summary>
    public static Arrival[] Fixed(int batch, int seed)
    {
        Random random = new(seed);
        return [.. Enumerable.Range(0, batch).Select(_ => new Arrival(Prompt(random, 128), 64))];
    }

    /// <summary>
    /// A GRPO step: <paramref name="prompts"/> prompts of 128 tokens, <paramref name="samples"/> samples each, lengths log-normal (median
    /// 90, sigma 0.7) to 256. Samples end at different lengths, so each is a request; a group's first sample is sent first, and the others
    /// after its first token, so that they find the prompt in a prefix cache where there is one.
    /// </summary>
    public static Arrival[] Grpo(int prompts, int samples, int seed)
    {
        Random random = new(seed);
        List<Arrival> arrivals = [];
        for (int prompt = 0; prompt < prompts; prompt++)
        {
            int[] ids = Prompt(random, 128);
            int leader = arrivals.Count;
            for (int sample = 0; sample < samples; sample++)
                arrivals.Add(new Arrival(ids, Length(random), After: sample == 0 ? -1 : leader));
        }

        return [.. arrivals];
    }

    /// <summary>Poisson arrivals at <paramref name="rate"/> a second: prompts of 32 to 256 tokens, lengths log-normal to 256.</summary>
    public static Arrival[] Open(double rate, int count, int seed)
    {
        Random random = new(seed);
        double at = 0;
        return [.. Enumerable.Range(0, count).Select(_ =>
        {
            at += -Math.Log(1 - random.NextDouble()) / rate;
            return new Arrival(Prompt(random, random.Next(32, 257)), Length(random), at);
        })];
    }

    private static int[] Prompt(Random random, int length) => [.. Enumerable.Range(0, length).Select(_ => random.Next(256, Vocabulary))];

    private static int Length(Random random)
    {
        double normal = Math.Sqrt(-2 * Math.Log(1 - random.NextDouble())) * Math.Cos(2 * Math.PI * random.NextDouble());
        return Math.Clamp((int)(90 * Math.Exp(0.7 * normal)), 4, 256);
    }
}
