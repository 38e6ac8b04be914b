namespace Rollout.Client;

/// <summary>Some groups of a batch were refused. Thrown after every sample of the other groups has been returned.</summary>
public sealed class RolloutBatchException(IReadOnlyList<RolloutException> refused) : RolloutException(Describe(refused), refused[0])
{
    private const int Shown = 5;

    /// <summary>One error for each refused group; <see cref="RolloutException.RequestId"/> says which.</summary>
    public IReadOnlyList<RolloutException> Refused { get; } = refused;

    private static string Describe(IReadOnlyList<RolloutException> refused)
    {
        string first = string.Join(Environment.NewLine, refused.Take(Shown).Select(error => error.Message));
        string rest = refused.Count > Shown ? $"{Environment.NewLine}and {refused.Count - Shown} more" : "";
        return $"{refused.Count} group(s) of the batch were refused:{Environment.NewLine}{first}{rest}";
    }
}
