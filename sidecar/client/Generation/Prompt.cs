namespace Rollout.Client;

/// <summary>Token ids, or text for a model that has a tokenizer. Converts from <c>int[]</c> and <c>string</c>.</summary>
public sealed class Prompt
{
    private Prompt(int[]? ids, string? text)
    {
        Ids = ids;
        Text = text;
    }

    /// <summary>Null where the prompt is text.</summary>
    public int[]? Ids { get; }

    /// <summary>Null where the prompt is ids.</summary>
    public string? Text { get; }

    /// <param name="ids">Kept, not copied.</param>
    /// <exception cref="ArgumentException">An id is negative.</exception>
    public static Prompt FromIds(int[] ids)
    {
        ArgumentNullException.ThrowIfNull(ids);
        int bad = ids.AsSpan().IndexOfAnyExceptInRange(0, int.MaxValue);
        if (bad >= 0)
            throw new ArgumentException($"token ids are not negative, but number {bad} is {ids[bad]}", nameof(ids));
        return new Prompt(ids, null);
    }

    /// <param name="text">Special tokens are added as the model's tokenizer says.</param>
    public static Prompt FromText(string text)
    {
        ArgumentNullException.ThrowIfNull(text);
        return new Prompt(null, text);
    }

    public static implicit operator Prompt(int[] ids) => FromIds(ids);

    public static implicit operator Prompt(string text) => FromText(text);
}
