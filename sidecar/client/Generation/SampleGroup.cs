namespace Rollout.Client;

/// <summary>A group whose samples have all ended.</summary>
/// <param name="Request">As it was sent.</param>
/// <param name="Samples">All <see cref="GenerateOptions.N"/> of them, by <see cref="Sample.Index"/>, for any finish reason.</param>
public sealed record SampleGroup(RolloutRequest Request, IReadOnlyList<Sample> Samples);
